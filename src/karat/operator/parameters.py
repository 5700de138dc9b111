"""The learned tensors of an operator: what orders act on."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from karat.basis import Basis
from karat.operator.edges import EdgeLayer, add_factors
from karat.operator.layout import Axes, Layout


class Settings(Protocol):
    """What an order may read of a `KArAtConfig`, which knows the orders by name."""

    @property
    def rank(self) -> int | None: ...
    @property
    def simplex(self) -> str | None: ...
    @property
    def position(self) -> str | None: ...
    @property
    def residual(self) -> str | None: ...
    @property
    def impl(self) -> str: ...


class OperatorParameters(nn.Module):
    """`layers` (an EdgeLayer each), `W`, `C`, `gate` and `sharpness` (H',), where there are such; H' heads learn.

    Each of them but the last two is learned up to a fixed factor, which sets its rate (`karat.operator.rates`; buffers
    `W_factor`, `C_factor` and the layers' `factor`): `projector`, `places` and `edges` give what they mean.

    Args:
        heads, num_tokens: H' and N.
        layout: the axes of all tensors.
        config: what the orders read; its rank is R.
        edges: the basis and edge scales of the layers; None where there are none.
        gated: whether there is a gate.
    """

    config: Settings
    W_factor: Tensor
    C_factor: Tensor

    def __init__(
        self,
        heads: int,
        num_tokens: int,
        layout: Layout,
        config: Settings,
        edges: tuple[Basis, bool | str] | None,
        gated: bool,
    ) -> None:
        super().__init__()
        self.heads, self.num_tokens, self.layout, self.config = heads, num_tokens, layout, config

        def sizes(axes: Axes) -> tuple[int, int]:
            return axes[0].size(num_tokens, config.rank), axes[1].size(num_tokens, config.rank)

        self.layers = nn.ModuleList(EdgeLayer(heads, *sizes(axes), *edges) for axes in layout.layers if edges)
        self.W, self.C = (
            nn.Parameter(torch.empty(heads, *sizes(axes))) if axes else None for axes in (layout.W, layout.C)
        )
        for name in layout.maps:
            self.register_buffer(f"{name}_factor", torch.ones(()))
        self.gate = nn.Parameter(torch.empty(heads)) if gated else None
        self.sharpness = nn.Parameter(torch.empty(heads)) if layout.sharpness else None

    @property
    def edge_layers(self) -> list[EdgeLayer]:
        """`layers`, by their type."""
        return list(self.layers)  # type: ignore[arg-type]  # all are

    @property
    def projector(self) -> Tensor | None:
        """W: (H',R,N) in order PhiW, (H',N,1) of a row, (H',N,R) elsewhere; None where there is none."""
        return None if self.W is None else self.W * self.W_factor

    @property
    def places(self) -> Tensor | None:
        """C, the term of each query's place: (H',N,R), of static mixing at full rank (H',N,N); None where there is
        none."""
        return None if self.C is None else self.C * self.C_factor

    def projector_as(self, x: Tensor) -> Tensor:
        """W in x's precision."""
        assert self.W is not None
        return (self.W * self.W_factor).to(x.dtype)

    def places_as(self, x: Tensor) -> Tensor:
        """C in x's precision."""
        assert self.C is not None
        return (self.C * self.C_factor).to(x.dtype)

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Make the map "W" or "C" what is given, factor included."""
        getattr(self, name).copy_(value / getattr(self, f"{name}_factor"))

    @torch.no_grad()
    def set_factor(self, name: str, factor: float) -> None:
        """Take another factor for "W" or "C" and leave the map what it is."""
        old: Tensor = getattr(self, f"{name}_factor")
        getattr(self, name).mul_(old / factor)
        old.fill_(factor)

    def factored(self) -> dict[str, tuple[str, ...]]:
        """The parameter that each buffer of a factor multiplies, by name; the layers have their own."""
        return {f"{name}_factor": (name,) for name in self.layout.maps}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        add_factors(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
