"""The peers by name: transformers whose MLP is a KAN, and the deep KAN classifier; all of them timm models.

>>> PEERS["kat_tiny_patch16_224"].mlp
'grkan(init=silu)'
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
from timm.models import generate_default_cfgs, load_pretrained, register_model
from torch import nn

from karat.basis.base import check_count
from karat.models.kan.classifier import KANClassifier
from karat.models.kan.mlp import replace_mlp


class Peer(NamedTuple):
    """A published model: timm's backbone, what stands in its MLPs' place, and where it is from."""

    backbone: str
    mlp: str
    source: str


def _table() -> dict[str, Peer]:
    peers = {}
    for size in ("tiny", "small", "base"):
        backbone = f"{size}_patch16_224"
        # KAT's second function begins as SiLU ("Swish") when it is trained from scratch (arXiv 2409.10594, §5.1).
        peers[f"kat_{backbone}"] = Peer(f"vit_{backbone}", "grkan(init=silu)", "KAT, arXiv 2409.10594")
        peers[f"vit_kan_{backbone}"] = Peer(f"vit_{backbone}", "kan", "ViT+KAN in arXiv 2409.10594")
        # Vision-KAN's published run has hidden width 192 in DeiT-Tiny: the model's own width, kan's ratio 1.
        peers[f"deit_kan_{backbone}"] = Peer(f"deit_{backbone}", "kan", "Vision-KAN, github.com/chenziwenhaoshuai")
    return peers


PEERS: dict[str, Peer] = _table()
DEEP_KAN = "deep_kan"
_PLACES = ("pretrained_cfg", "pretrained_cfg_overlay")  # where timm says which weights are meant

# timm reads a model's input size here; the classifier has no size of its own, CIFAR's is what the paper used most.
default_cfgs = generate_default_cfgs(
    {DEEP_KAN: {"input_size": (3, 32, 32), "num_classes": 10, "first_conv": None, "classifier": None}}
)


def create_deep_kan(
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int | Sequence[int] = 32,
    layers: Sequence[int] = (10, 10),
    grid: int = 10,
    order: int = 3,
    range: float | tuple[float, float] = 4.0,
    base: str = "silu",
) -> KANClassifier:
    """The classifier of the paper's Table 14 for images: see `KANClassifier`; `layers` are its hidden widths.

    img_size: side or (height, width) in pixels. Raises ValueError for anything else.

    >>> create_deep_kan(layers=(20, 40), order=1, in_chans=1, img_size=8).in_features
    64
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2:
        raise ValueError(f"img_size must be a side or (height, width) in pixels, got {img_size!r}")
    for name, value in (("in_chans", in_chans), ("img_size", sides[0]), ("img_size", sides[1])):
        check_count("create_deep_kan", name, value, 1)
    return KANClassifier(in_chans * sides[0] * sides[1], layers, num_classes, grid, order, range, base)


def _peer_entry(name: str, peer: Peer) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained and peer.mlp.startswith("grkan") and any(kwargs.get(key) for key in _PLACES):
            return _published(peer, **kwargs)
        for key in (*_PLACES, "cache_dir"):
            kwargs.pop(key, None)
        # A softmax ViT to start from has GELU: KAT then fits its functions to that (arXiv 2409.10594, §4.4).
        mlp = peer.mlp.replace("init=silu", "init=gelu") if pretrained else peer.mlp
        return replace_mlp(timm.create_model(peer.backbone, pretrained=pretrained, **kwargs), mlp, take_over=pretrained)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{peer.backbone} with {peer.mlp} for its MLP: {peer.source}."
    return build


def _published(peer: Peer, **kwargs: Any) -> nn.Module:
    """The peer with the weights of KAT's own that timm's configuration names, a file's or the Hub's."""
    model = timm.create_model(peer.backbone, **kwargs)
    replace_mlp(model, peer.mlp.replace("(", "(form=code,"))
    cfg: Any = model.pretrained_cfg
    load_pretrained(
        model, cfg, num_classes=kwargs.get("num_classes", cfg["num_classes"]), in_chans=kwargs.get("in_chans", 3)
    )
    return model


def _deep_kan_entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if pretrained:
        raise ValueError("deep_kan has no pretrained weights")
    for key in (*_PLACES, "cache_dir"):
        kwargs.pop(key, None)
    return create_deep_kan(**kwargs)


def register_peers() -> None:
    """Make the peers known to timm.create_model, once."""
    module = sys.modules[__name__]
    entries = {name: _peer_entry(name, peer) for name, peer in PEERS.items()}
    _deep_kan_entry.__name__ = DEEP_KAN
    for name, entry in {**entries, DEEP_KAN: _deep_kan_entry}.items():
        if not timm.is_model(name):
            setattr(module, name, register_model(entry))
