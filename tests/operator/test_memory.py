"""What one attention keeps for the backward pass, counted with saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from karat import KArAtOperator
from karat.study.bench import paper_way


def bytes_kept(attend: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...], op: KArAtOperator) -> int:
    """Every tensor that is packed counts, but those that live in the parameters' memory."""
    kept = 0
    parameters = {parameter.untyped_storage().data_ptr() for parameter in op.parameters()}

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        if x.untyped_storage().data_ptr() not in parameters:
            kept += x.numel() * x.element_size()
        return x

    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend(q, k, v)
    return kept


@pytest.mark.parametrize("impl", ["auto", "tiled"])
def test_less_than_sdpa_keeps(impl: str) -> None:
    shape = (8, 3, 197, 64)
    op = KArAtOperator(3, 197, f"g3b,impl={impl}")
    ours = bytes_kept(op.attend, shape, op)
    fused = bytes_kept(F.scaled_dot_product_attention, shape, op)
    assert ours <= 0.85 * fused
    materialised = bytes_kept(lambda q, k, v: paper_way.attend(op, q, k, v), shape, op)
    assert materialised > 10 * ours  # the count does see what is kept


@pytest.mark.parametrize("config", ["g3b", "g3b,order=PhiW", "g3b,order=PhiPhi", "morlet-b", "rational-b,rank=4"])
def test_grows_linearly_with_the_tokens(config: str) -> None:
    sizes = (129, 257, 785) if "g3b" not in config else (197, 785, 3137)  # with few tokens less is kept
    kept = []
    for tokens in sizes:
        op = KArAtOperator(1, tokens, f"{config},impl=tiled,init=paper")
        kept.append(bytes_kept(op.attend, (1, 1, tokens, 16), op))
    first, second = ((kept[i + 1] - kept[i]) / (sizes[i + 1] - sizes[i]) for i in range(2))
    assert second == pytest.approx(first, rel=0.01)  # a line, with what doesn't depend on N as its offset


def test_full_rank_keeps_nothing_of_the_size_of_sigma() -> None:
    kept = []
    for tokens in (65, 130, 195):
        op = KArAtOperator(1, tokens, "g2b,rank=None,impl=tiled")
        kept.append(bytes_kept(op.attend, (2, 1, tokens, 8), op))
    assert kept[2] - kept[1] == kept[1] - kept[0]
