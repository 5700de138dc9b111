"""`karat.share.transformers` under its public name."""

from karat.share.transformers import from_pretrained, karat_attention_forward, karatize_hf

__all__ = ["from_pretrained", "karat_attention_forward", "karatize_hf"]
