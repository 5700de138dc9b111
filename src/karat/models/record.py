"""Scores and attention of every block, handed out while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from timm.models.convit import GPSA, MHSA
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from karat.models.attention import (
    AttentionInputs,
    BiasedAttention,
    KArAtAttention,
    KArAtWindowAttention,
    token_inputs,
    window_inputs,
)
from karat.ops.masks import safe_softmax


@dataclass(frozen=True)
class Intermediate:
    """One attention module in one forward pass.

    scores (B,H,M,N): scale·q kᵀ + bias. attention (B,H,M,N): σ, before dropout. mask: boolean, broadcastable to
    (B,H,M,N), True = takes part; None where there is none. In Swin B counts windows.
    """

    scores: Tensor
    attention: Tensor
    mask: Tensor | None = None


def _learnable(read: Callable[..., AttentionInputs]) -> Callable[..., Intermediate]:
    def intermediate(attn: Any, *args: Any, **kwargs: Any) -> Intermediate:
        inputs = read(attn, *args, **kwargs)
        scores = inputs.scores
        return Intermediate(scores, attn.present_operator(scores.shape[-1])(scores, inputs.mask), inputs.mask)

    return intermediate


def _softmax(read: Callable[..., AttentionInputs]) -> Callable[..., Intermediate]:
    def intermediate(attn: Any, *args: Any, **kwargs: Any) -> Intermediate:
        inputs = read(attn, *args, **kwargs)
        scores, mask = inputs.scores, inputs.mask
        mask = mask if mask is None or mask.dim() == 4 else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        return Intermediate(scores, safe_softmax(scores, mask), mask)

    return intermediate


def _gated_positional(attn: Any, x: Tensor) -> Intermediate:
    """ConViT's GPSA: scores are its content scores; attention is their softmax, mixed with the positional one."""
    B, N, _ = x.shape
    q, k = attn.qk(x).reshape(B, N, 2, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    training = attn.attn_drop.training
    attn.attn_drop.eval()  # as everywhere here, attention before dropout
    try:
        attention = attn.get_attention(x)
    finally:
        attn.attn_drop.train(training)
    return Intermediate(q @ k.transpose(-2, -1) * attn.scale, attention)


READERS: dict[type[nn.Module], Callable[..., Intermediate]] = {
    Attention: _softmax(token_inputs),
    MHSA: _softmax(token_inputs),
    WindowAttention: _softmax(window_inputs),
    GPSA: _gated_positional,
    BiasedAttention: _softmax(token_inputs),
    KArAtAttention: _learnable(token_inputs),
    KArAtWindowAttention: _learnable(window_inputs),
}


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Intermediate]]:
    """Collect the scores and the attention of every block, learnable and softmax alike, while the context is open.

    Yields a dict from module names ("blocks.3.attn") to `Intermediate`, filled by each forward pass; a later pass
    overwrites. The model's output is untouched: scores and σ are computed beside it from the same inputs, so a pass
    costs more time, and N×N memory a block; under torch.no_grad() no graph is kept.

    Raises ValueError if the model has no attention that is known.

    >>> import karat, torch
    >>> model = karat.create_model("vit_tiny_patch16_224", attention="g3b", img_size=32, depth=2).eval()
    >>> with karat.record(model) as intermediates, torch.no_grad():
    ...     _ = model(torch.randn(1, 3, 32, 32))
    >>> intermediates["blocks.1.attn"].attention.shape
    torch.Size([1, 3, 5, 5])
    """
    readers = {
        name: (module, READERS[type(module)]) for name, module in model.named_modules() if type(module) in READERS
    }
    if not readers:
        raise ValueError(
            f"{type(model).__name__} has no attention that karat.record knows; it knows "
            + ", ".join(kind.__name__ for kind in READERS)
        )
    intermediates: dict[str, Intermediate] = {}

    def hook(name: str, read: Callable[..., Intermediate]) -> Callable[..., None]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            intermediates[name] = read(module, *args, **kwargs)

        return after_forward

    handles = [
        module.register_forward_hook(hook(name, read), with_kwargs=True) for name, (module, read) in readers.items()
    ]
    try:
        yield intermediates
    finally:
        for handle in handles:
            handle.remove()
