"""New modules in every place of the old ones, and the hooks that were on those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import karat
from karat.models.kan import replace_mlp
from karat.models.transfer import transfer_attention
from support.small_models import images, small_model


def convert(model: Any, way: str) -> None:
    """One of the ways to exchange modules of a ViT."""
    if way == "transfer":
        transfer_attention(model, small_model("vit"), images("vit"))
    elif way == "mlp":
        replace_mlp(model, "grkan(groups=4)")
    else:
        karat.karatize(model, way)


@pytest.mark.parametrize("way", ["g3b", "g3u", "diff", "softmax,position_bias=relative", "transfer", "mlp"])
def test_what_blocks_share_they_share_afterwards(way: str) -> None:
    """One of two places kept what was to go, or each got a module of its own."""
    model: Any = small_model("vit")
    name = "mlp" if way == "mlp" else "attn"
    old = getattr(model.blocks[0], name)
    setattr(model.blocks[1], name, old)
    seen: list[nn.Module] = []
    handle = old.register_forward_hook(lambda module, args, output: seen.append(module))
    convert(model, way)
    seen.clear()
    new = getattr(model.blocks[0], name)
    assert new is getattr(model.blocks[1], name) is not old
    model(images("vit"))
    assert seen == [new, new]
    handle.remove()
    model(images("vit"))
    assert seen == [new, new]


def test_no_blocks_are_no_attention() -> None:
    """Softmax in every block went by the name of what was asked for."""
    with pytest.raises(
        ValueError, match=r"blocks=\(\) names no block, so nothing would learn; use attention='softmax'"
    ):
        small_model("vit", "g3b,blocks=()")


def test_an_error_leaves_all_mlps() -> None:
    model: Any = small_model("vit")
    model.blocks[1].mlp.norm = nn.LayerNorm(96)
    before = [block.mlp for block in model.blocks]
    with pytest.raises(ValueError, match="norm inside"):
        replace_mlp(model, "kan")
    assert [block.mlp for block in model.blocks] == before
    assert torch.equal(model(images("vit")).isfinite().all(), torch.tensor(True))
