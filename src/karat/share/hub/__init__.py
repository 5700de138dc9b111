"""Models that leave the machine they were trained on: folders and the Hugging Face Hub.

A saved model is one folder: config.json (how to build the model, and how it wants its images), model.safetensors
(the weights, under the backbone's own names) and README.md (the model card).
"""

from karat.runs.saved import ModelConfig
from karat.share.hub.model import KArAtModel, from_pretrained

__all__ = ["KArAtModel", "ModelConfig", "from_pretrained"]
