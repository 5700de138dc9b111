"""A layer of edge functions: one learnable univariate function for each (head, input, output)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from karat.basis import Basis, EdgeParameter


class EdgeLayer(nn.Module):
    """The parameters of H·P·Q edge functions φ_pq, y_p = Σ_q φ_pq(x_q), head by head.

    One nn.Parameter (H, count, Q, P) for each group of the basis, e.g. `coefficients`; with edge scales also
    `basis_scale` s_f (H,Q,P) and, if there is a base activation or `published` asks for it, `base_scale` s_b (H,Q,P).
    Each is learned up to the fixed `factor` (F,1,1) of its place in u, which sets its rate (`karat.operator.rates`);
    those of `basis_scale` and of a base activation without a scale are one.
    """

    base_gain: Tensor
    factor: Tensor

    def __init__(self, num_heads: int, inputs: int, outputs: int, basis: Basis, edge_scales: bool | str) -> None:
        super().__init__()
        self.basis = basis
        self.inputs, self.outputs = inputs, outputs
        for group in basis.parameters:
            if group.name != "base":
                self.register_parameter(group.name, nn.Parameter(torch.empty(num_heads, group.count, inputs, outputs)))
        self.basis_scale: nn.Parameter | None = None
        self.base_scale: nn.Parameter | None = None
        if edge_scales:
            self.basis_scale = nn.Parameter(torch.empty(num_heads, inputs, outputs))
        if edge_scales and (self.has_base or edge_scales == "published"):
            # Without a base activation s_b never gets a gradient: it's there to be counted (SPEC §2).
            self.base_scale = nn.Parameter(torch.empty(num_heads, inputs, outputs), requires_grad=self.has_base)
        self.register_buffer("factor", torch.ones(basis.num_parameters, 1, 1))
        if self.has_base and not edge_scales:
            # b(x) enters as it is (paper eq. 5), until another token grid asks for another size of its sum (SPEC §9).
            self.register_buffer("base_gain", torch.ones(inputs, outputs))

    @property
    def has_base(self) -> bool:
        """Whether φ has a base activation b(x)."""
        return self.basis.parameters[0].name == "base"

    @property
    def has_fixed_base(self) -> bool:
        """Whether b(x) enters with a factor that isn't learned (no edge scales)."""
        return self.has_base and self.base_scale is None

    @property
    def amplitudes(self) -> list[nn.Parameter]:
        """The parameters that multiply φ as a whole, of each product one factor."""
        groups = [
            getattr(self, group.name) for group in self.basis.parameters if group.amplitude and group.name != "base"
        ]
        return [*groups, self.base_scale] if self.has_base and self.base_scale is not None else groups

    def values(self) -> dict[str, Tensor]:
        """Every parameter times its factor, by name: the numbers that the functions are made of."""
        found: dict[str, Tensor] = dict(self.named_parameters())
        for start, group in starts(self.basis):
            name = "base_scale" if group.name == "base" else group.name
            if name in found:
                mine = self.factor[start : start + group.count]  # (count,1,1)
                found[name] = found[name] * (mine[0] if group.name == "base" else mine)
        return found

    def packed(self) -> Tensor:
        """The edges' parameters as basis attention takes them, scales and factors folded in: (H,F,Q,P)."""
        return self.stacked() * self.factor

    def stacked(self) -> Tensor:
        """The same without the factors: at full rank they are better multiplied into less than all edges."""
        parts = []
        gain = self.basis.key_gain(self.inputs)
        for group in self.basis.parameters:
            if group.name == "base":
                parts.append(self._packed_base())
                continue
            part: Tensor = getattr(self, group.name)
            if group.amplitude and self.basis_scale is not None:
                part = part * self.basis_scale.unsqueeze(1)
            if group.amplitude and gain is not None:
                part = part * gain.to(part).unsqueeze(-1)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @torch.no_grad()
    def set_factor(self, factor: Tensor) -> None:
        """Take another factor (F,1,1) for each place in u and leave every function what it is."""
        ratio = self.factor / factor.to(self.factor)
        for start, group in starts(self.basis):
            mine = ratio[start : start + group.count]  # (count,1,1)
            if group.name != "base":
                getattr(self, group.name).mul_(mine)
            elif self.base_scale is not None:
                self.base_scale.mul_(mine[0])
        self.factor.copy_(factor)

    def factored(self) -> dict[str, tuple[str, ...]]:
        """The parameters that each buffer of factors multiplies, by name."""
        groups = [group.name for group in self.basis.parameters if group.name != "base"]
        return {"factor": (*groups, "base_scale") if self.has_base and self.base_scale is not None else tuple(groups)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        add_factors(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _packed_base(self) -> Tensor:
        if self.base_scale is not None:
            return self.base_scale.unsqueeze(1)
        heads: int = next(self.parameters()).shape[0]
        return self.base_gain.expand(heads, 1, self.inputs, self.outputs)

    def edges(self, x: Tensor) -> Tensor:
        """φ_pq(x): x (...,) -> (...,H,P,Q), in x's precision."""
        u = self.packed().to(x.dtype).transpose(0, 1)  # (F,H,Q,P)
        return self.basis.edge(x[..., None, None, None], u).transpose(-2, -1)

    def extra_repr(self) -> str:
        return f"basis={self.basis}, inputs={self.inputs}, outputs={self.outputs}"


def add_factors(module: Any, weights: dict[str, Any], prefix: str = "") -> None:
    """Complete weights that were saved before there were factors: such a module was trained with factors of one."""
    for buffer, parameters in module.factored().items():
        if any(prefix + name in weights for name in parameters):
            like = next(weights[prefix + name] for name in parameters if prefix + name in weights)
            ones = torch.ones_like(getattr(module, buffer), device="cpu", dtype=like.dtype)
            weights.setdefault(prefix + buffer, ones)


def starts(basis: Basis) -> list[tuple[int, EdgeParameter]]:
    """The groups of a basis, each with the place of its first number in u."""
    found, start = [], 0
    for group in basis.parameters:
        found.append((start, group))
        start += group.count
    return found
