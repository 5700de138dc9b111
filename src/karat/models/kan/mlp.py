"""KAN layers in place of a transformer's MLPs.

>>> parse_mlp("kan(grid=5)")
SplineMLP(ratio=1.0, grid=5, order=3, range=4.0, base='silu')
>>> import timm
>>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
>>> type(replace_mlp(model, "grkan").blocks[0].mlp).__name__
'GroupRationalMlp'

A new kind is one dataclass with its `layer` or `build`, and one line in MLPS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from karat.basis.base import check_positive
from karat.basis.specs import parse_call
from karat.models.exchange import exchange
from karat.models.kan.rational import GroupRational, PublishedRational, Rational
from karat.models.kan.rational_fit import IDENTITY
from karat.models.kan.spline import SplineLinear
from karat.models.kan.waves import FourierLinear, RBFLinear


class EdgeMlp(nn.Module):
    """Two KAN layers with learnable functions on every edge: (...,Q) -> (...,hidden) -> (...,P), dropout after each."""

    def __init__(
        self, layer: Callable[[int, int], nn.Module], sizes: tuple[int, int, int], drop: tuple[float, float]
    ) -> None:
        super().__init__()
        self.fc1 = layer(sizes[0], sizes[1])
        self.drop1 = nn.Dropout(drop[0])
        self.fc2 = layer(sizes[1], sizes[2])
        self.drop2 = nn.Dropout(drop[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.fc1(x))))


class GroupRationalMlp(nn.Module):
    """Two GR-KAN layers, y = W₂ F₂(W₁ F₁(x)) with group-rational F (KAT, arXiv 2409.10594, eq. 17).

    `function` makes an F of what it begins as: F₁ of the identity, F₂ of `init`. The weights' variances are α/Q, which
    keeps that of the signal (§4.4). `fc1` and `fc2` are named and shaped as in timm's Mlp, so that a ViT's weights load
    into them (§4.4, Figure 4).
    """

    def __init__(
        self,
        sizes: tuple[int, int, int],
        drop: tuple[float, float],
        function: Callable[[str], Rational],
        init: str = "gelu",
    ) -> None:
        super().__init__()
        self.act1 = function(IDENTITY)
        for size in sizes[:2]:
            if size % self.act1.groups:
                raise ValueError(f"grkan: groups={self.act1.groups} doesn't divide {size} channels; choose a divisor")
        self.drop1 = nn.Dropout(drop[0])
        self.fc1 = nn.Linear(sizes[0], sizes[1])
        self.act2 = function(init)
        self.drop2 = nn.Dropout(drop[1])
        self.fc2 = nn.Linear(sizes[1], sizes[2])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew and set the functions to their starts."""
        for function, linear in ((self.act1, self.fc1), (self.act2, self.fc2)):
            function.reset_parameters()
            nn.init.normal_(linear.weight, std=math.sqrt(function.gain() / linear.in_features))
            nn.init.zeros_(linear.bias)

    @torch.no_grad()
    def take_over(self, mlp: Mlp) -> None:
        """Take an MLP's weights: the same function, as far as F₂ is near to the MLP's activation."""
        for mine, theirs in ((self.fc1, mlp.fc1), (self.fc2, mlp.fc2)):
            if mine.weight.shape != theirs.weight.shape:
                raise ValueError(
                    f"an MLP's weights {tuple(theirs.weight.shape)} don't fit {tuple(mine.weight.shape)}; leave ratio "
                    "as the model has it"
                )
            mine.weight.copy_(theirs.weight)
            if theirs.bias is not None:
                mine.bias.copy_(theirs.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop2(self.act2(self.fc1(self.drop1(self.act1(x))))))


@dataclass(frozen=True)
class MLPKind:
    """The settings of a replacement; `ratio` is hidden width / input width, None that of the MLP replaced."""

    ratio: float | None = 1.0

    name: ClassVar[str]
    layer: ClassVar[Callable[..., nn.Module]]  # of an edge MLP: (inputs, outputs, the settings by name)

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_positive(self.name, "ratio", self.ratio)

    def sizes(self, inputs: int, hidden: int, outputs: int) -> tuple[int, int, int]:
        """Widths, given those of the MLP replaced."""
        return inputs, hidden if self.ratio is None else max(1, round(self.ratio * inputs)), outputs

    def build(self, sizes: tuple[int, int, int], drop: tuple[float, float]) -> nn.Module:
        """The module, of these widths and dropout rates."""
        return EdgeMlp(partial(type(self).layer, **self.settings()), sizes, drop)

    def settings(self) -> dict[str, Any]:
        """What the layers are built with."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "ratio"}

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({','.join(changed)})" if changed else self.name


@dataclass(frozen=True)
class SplineMLP(MLPKind):
    """Two B-spline KAN layers of hidden width D (see `SplineLinear`).

    As they stand 12 numbers an edge, G + k + 1, which gives ViT+KAN-Tiny 12.8 M parameters, as KAT's paper counts,
    and Small 50.3 M, where it has 50.4.
    """

    grid: int = 8
    order: int = 3
    range: float = 4.0
    base: str = "silu"

    name: ClassVar[str] = "kan"
    layer = SplineLinear


FORMS = ("paper", "code")


@dataclass(frozen=True)
class GroupRationalMLP(MLPKind):
    """Two GR-KAN layers of the MLP's own hidden width (see `GroupRationalMlp`).

    form: "paper" shares one denominator 1 + |Σ b_j x^j| among the groups (`GroupRational`), "code" is KAT's published
    code, whose weights it takes: one numerator, a denominator 1 + Σ |b_j x^j| a group (`PublishedRational`).
    """

    ratio: float | None = None
    groups: int = 8
    m: int = 5
    n: int = 4
    init: str = "gelu"
    share_denominator: bool = True
    form: str = "paper"

    name: ClassVar[str] = "grkan"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise ValueError(f"grkan: form={self.form!r}; give one of {', '.join(FORMS)}")
        if self.form == "code" and not self.share_denominator:
            raise ValueError("grkan: share_denominator is form=paper's; form=code has a denominator for each group")

    def build(self, sizes: tuple[int, int, int], drop: tuple[float, float]) -> GroupRationalMlp:
        def function(init: str) -> Rational:
            if self.form == "code":
                return PublishedRational(self.groups, self.m, self.n, init)
            return GroupRational(self.groups, self.m, self.n, init, self.share_denominator)

        return GroupRationalMlp(sizes, drop, function, self.init)


@dataclass(frozen=True)
class FourierMLP(MLPKind):
    """Two Fourier KAN layers of hidden width D (see `FourierLinear`)."""

    grid: int = 3

    name: ClassVar[str] = "fourierkan"
    layer = FourierLinear


@dataclass(frozen=True)
class FastMLP(MLPKind):
    """Two RBF KAN layers of hidden width D (see `RBFLinear`)."""

    grid: int = 8
    range: float = 2.0

    name: ClassVar[str] = "fastkan"
    layer = RBFLinear


MLPS: dict[str, type[MLPKind]] = {kind.name: kind for kind in (SplineMLP, GroupRationalMLP, FourierMLP, FastMLP)}
PLAIN = "mlp"


def refuse_other_form(model: nn.Module, names: Collection[str]) -> None:
    """ValueError where weights by these names are those of KAT's published code and the model has other MLPs.

    The rest of a ViT would fit, and be a half of another model.
    """
    theirs = ".mlp.act2.weight_denominator"
    if any(name.endswith(theirs) for name in names) and not any(name.endswith(theirs) for name in model.state_dict()):
        raise ValueError(
            "these are weights of KAT's published code, which this model's MLPs can't take; give the plain model "
            '(--model vit_tiny_patch16_224, ...) and --mlp "grkan(form=code)"'
        )


def parse_mlp(spec: str | MLPKind) -> MLPKind | None:
    """The replacement that a spec such as "grkan" or "kan(grid=5,ratio=4)" names; None for "mlp", the MLP itself.

    Raises ValueError for a spec that can't be read, an unknown name or setting.
    """
    if isinstance(spec, MLPKind):
        return spec
    name, settings = parse_call(spec)
    if name == PLAIN and not settings:
        return None
    if name not in MLPS:
        raise ValueError(f"unknown mlp {name!r}; choose one of {PLAIN}, {', '.join(MLPS)}")
    known = [field.name for field in dataclasses.fields(MLPS[name])]
    for key in settings:
        if key not in known:
            raise ValueError(f"mlp {name!r} has no setting {key!r}; it takes {', '.join(known)}")
    return MLPS[name](**settings)


def replace_mlp(model: nn.Module, spec: str | MLPKind, *, take_over: bool = False) -> nn.Module:
    """Put KAN layers in the place of every MLP (timm's Mlp) of a ViT, DeiT, Swin, ConViT; returns the model.

    Args:
        model: the model; its attention is left alone, learnable or not.
        spec: "kan", "grkan", "fourierkan", "fastkan", with settings, e.g. "kan(grid=5)"; "mlp" changes nothing.
        take_over: let grkan layers have the MLPs' weights, as KAT starts from a ViT; the other kinds have none of
            that shape and are drawn anew.

    Raises ValueError if the model has no such MLP, or a ViT's weights don't fit because of `ratio`.
    """
    kind = parse_mlp(spec)
    if kind is None:
        return model
    places = [
        module for name, module in model.named_modules() if isinstance(module, Mlp) and name.rpartition(".")[2] == "mlp"
    ]
    if not places:
        raise ValueError(f"{type(model).__name__} has no MLP of timm's kind (timm.layers.Mlp) to replace by {kind}")
    replacements: dict[nn.Module, nn.Module] = {}  # all first: an error leaves the model as it was
    for old in places:
        if not isinstance(old.fc1, nn.Linear) or not isinstance(old.norm, nn.Identity):
            raise ValueError(f"an MLP with convolutions or a norm inside can't be replaced by {kind}")
        sizes = kind.sizes(old.fc1.in_features, old.fc1.out_features, old.fc2.out_features)
        new = kind.build(sizes, (old.drop1.p, old.drop2.p)).to(old.fc1.weight)
        new.train(old.training)
        if take_over and isinstance(new, GroupRationalMlp):
            new.take_over(old)
        replacements[old] = new
    exchange(model, replacements)
    return model
