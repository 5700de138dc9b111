"""A layer of edge functions: one learnable univariate function for each (head, input, output)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from karat.basis import Basis


class EdgeLayer(nn.Module):
    """The parameters of H·P·Q edge functions φ_pq, y_p = Σ_q φ_pq(x_q), head by head.

    One nn.Parameter (H, count, Q, P) for each group of the basis, e.g. `coefficients`; with edge scales also
    `basis_scale` s_f (H,Q,P) and, if there is a base activation or `published` asks for it, `base_scale` s_b (H,Q,P).
    """

    base_gain: Tensor

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
        if self.has_base and not edge_scales:
            # b(x) enters as it is (paper eq. 5), until another token grid asks for another size of its sum (SPEC §9).
            self.register_buffer("base_gain", torch.ones(inputs, outputs))

    @property
    def has_base(self) -> bool:
        """Whether φ has a base activation b(x)."""
        return self.basis.parameters[0].name == "base"

    @property
    def amplitudes(self) -> list[nn.Parameter]:
        """The parameters that multiply φ as a whole, of each product one factor."""
        groups = [
            getattr(self, group.name) for group in self.basis.parameters if group.amplitude and group.name != "base"
        ]
        return [*groups, self.base_scale] if self.has_base and self.base_scale is not None else groups

    def packed(self) -> Tensor:
        """The edges' parameters as basis attention takes them, scales folded in: (H,F,Q,P)."""
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
