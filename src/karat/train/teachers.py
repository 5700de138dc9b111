"""The softmax models that `karat convert` starts from: a run's, or timm's by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from karat import runs
from karat.errors import first_line
from karat.models.create import create_model
from karat.models.fit import check_numbers, unwrapped
from karat.operator.config import KArAtConfig
from karat.runs import files
from karat.runs.checkpoint import load_weights
from karat.runs.classification import Settings
from karat.runs.model import build_model, load_run
from karat.runs.weights import quiet_hub


def softmax_run(folder: Path, weights: str) -> tuple[nn.Module, Settings, dict[str, Any]]:
    """A run's model, its settings and the facts of its config.json.

    Raises ValueError for a run whose attention isn't plain softmax of its own.
    """
    settings, facts = runs.read_config(folder)
    if settings.teacher is not None:
        raise ValueError(f"{folder} runs on another's attention: nothing to convert; give {settings.teacher} instead")
    attention = KArAtConfig.parse(settings.attention)
    if not attention.leaves_attention:
        what = "no softmax attention" if attention.is_fixed else "learnable attention already"
        raise ValueError(f"{folder} has {what} ({settings.attention}); give one of plain softmax")
    return load_run(folder, weights), settings, facts


def softmax_timm(settings: Settings, num_classes: int, in_chans: int, checkpoint: Path | None) -> nn.Module:
    """timm's model of these settings, with the weights of a safetensors file or timm's pretrained ones.

    Raises ValueError for weights that can't be had or don't fit.
    """
    if checkpoint is not None:
        model = build_model(replace(settings, attention="softmax"), num_classes, in_chans)
        if not checkpoint.is_file():
            raise ValueError(f"--checkpoint {checkpoint}: no such file; give a safetensors file")
        weights = unwrapped(files.read_tensors(checkpoint), model.state_dict().keys())
        check_numbers(weights, model.state_dict(), f"--checkpoint {checkpoint}: ")
        load_weights(model, weights, str(checkpoint))
        return model
    sizes = {"num_classes": num_classes, "in_chans": in_chans, **settings.model_kwargs()}
    try:
        with quiet_hub():
            return create_model(settings.model, "softmax", pretrained=True, **sizes)
    except ValueError:
        raise
    except Exception as error:  # timm raises RuntimeError, the Hub's client its own kinds
        raise ValueError(
            f"{settings.model}: pretrained weights can't be loaded ({first_line(error)}); give them with "
            "--checkpoint FILE"
        ) from error
