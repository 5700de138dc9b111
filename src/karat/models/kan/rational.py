"""Group-rational functions: one learnable rational function for each group of channels (KAT)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from karat.basis.base import check_count
from karat.models.kan.plain import plain_formulas
from karat.models.kan.rational_fit import fit_rational, gain
from karat.models.tracing import one_node

# Values of x that are worked on at a time, with the powers and polynomials of each beside them: a few times that
# must fit a CPU's cache, while a GPU wants few launches.
_CHUNK = {"cpu": 1 << 16}
_CHUNK_ELSEWHERE = 1 << 22


def group_rational(x: Tensor, numerator: Tensor, denominator: Tensor, terms: bool = False) -> Tensor:
    """F(x) = (a_0 + a_1 x + … + a_m x^m) / (1 + |b_1 x + … + b_n x^n|), elementwise: safe Padé.

    With `terms` the denominator is 1 + |b_1 x| + … + |b_n x^n|, which KAT's published code computes.

    x (...,C) has its channels in g equal groups; numerator (g,m+1) or (1,m+1), denominator (g,n) or (1,n), one row
    for each group or one for all. The derivative of |P| where P = 0 is taken to be that from above, so that
    denominators that start at zero can learn. Source: KAT, arXiv 2409.10594, eq. 12.

    Only x is kept for the backward pass, which works block by block: powers, polynomials and the contributions to
    the coefficients' gradients of one block at a time, added up at once. Half precision is computed in float32.

    Raises ValueError if the groups don't divide the channels or differ between numerator and denominator.
    """
    groups = max(len(numerator), len(denominator))
    if x.shape[-1] % groups or not {len(numerator), len(denominator)} <= {1, groups}:
        raise ValueError(
            f"{x.shape[-1]} channels, {len(numerator)} numerators and {len(denominator)} denominators don't fit: the "
            "number of groups must divide the channels, and each has one row or as many as there are groups"
        )
    if plain_formulas(x, numerator, denominator):
        return rational_formula(x, numerator, denominator, terms)
    out: Tensor = _GroupRational.apply(x, numerator, denominator, terms)
    return out


def rational_formula(x: Tensor, numerator: Tensor, denominator: Tensor, terms: bool = False) -> Tensor:
    """`group_rational` as it is written down: the definition, differentiable any number of times."""
    groups = max(len(numerator), len(denominator))
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = x.to(dtype).unflatten(-1, (groups, -1))
    a, b = numerator.to(dtype), denominator.to(dtype)
    top = a[:, -1:]
    for i in range(a.shape[1] - 2, -1, -1):
        top = top * z + a[:, i : i + 1]
    if terms:
        z, b = _absolute(z), _absolute(b)
    bottom = b[:, -1:] * z
    for j in range(b.shape[1] - 2, -1, -1):
        bottom = (bottom + b[:, j : j + 1]) * z
    return (top / (1 + _absolute(bottom))).flatten(-2).to(x.dtype)


def _absolute(x: Tensor) -> Tensor:
    """|x| with the derivative from above at 0."""
    return torch.where(x >= 0, x, -x)


def _sign(x: Tensor) -> Tensor:
    """Its derivative."""
    return torch.where(x >= 0, 1.0, -1.0)


class _Blocks:
    """x (T,C) as blocks of rows, each with room for the powers x^0..x^K of every group's values: (g, K+1, rows·C/g)."""

    def __init__(self, x: Tensor, groups: int, degree: int) -> None:
        self.rows_total, channels = x.shape
        self.groups, self.width, self.degree = groups, channels // groups, degree
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        size = max(1, _CHUNK.get(x.device.type, _CHUNK_ELSEWHERE) // channels)
        self.starts = range(0, self.rows_total, size)
        self.size = min(size, self.rows_total)
        self.powers = torch.empty(groups, degree + 1, self.size * self.width, dtype=self.dtype, device=x.device)
        self.powers[:, 0] = 1

    def grouped(self, x: Tensor, start: int) -> Tensor:
        """The block of x (T,C) that starts there, as a view (g, rows, C/g)."""
        return x[start : start + self.size].unflatten(1, (self.groups, self.width)).transpose(0, 1)

    def powers_of(self, block: Tensor) -> Tensor:
        """Powers of a block (g, rows, C/g), written into the room: (g, K+1, rows·C/g)."""
        powers = self.powers[..., : block.shape[1] * self.width]
        powers[:, 1].unflatten(1, (-1, self.width)).copy_(block)
        for i in range(2, self.degree + 1):  # products of halves: few roundings
            torch.mul(powers[:, i // 2], powers[:, i - i // 2], out=powers[:, i])
        return powers


def _polynomials(blocks: _Blocks, a: Tensor, b: Tensor, slopes: bool) -> Tensor:
    """Coefficients (g, 2 or 4, K+1) of x^0..x^K in the numerator, in what |·| holds, and in their derivatives."""
    g, K = blocks.groups, blocks.degree
    table = torch.zeros(g, 4 if slopes else 2, K + 1, dtype=blocks.dtype, device=a.device)
    table[:, 0, : a.shape[1]] = a
    table[:, 1, 1 : b.shape[1] + 1] = b
    if slopes:
        table[:, 2:, :-1] = table[:, :2, 1:] * torch.arange(1, K + 1, dtype=blocks.dtype, device=a.device)
    return table


def _values(table: Tensor, powers: Tensor, terms: bool) -> Tensor:
    """The polynomials of `_polynomials` at a block: (g, 2 or 4, values); with `terms` those below are of |x|."""
    values = torch.bmm(table, powers)
    if terms:
        values[:, 1::2] = torch.bmm(table[:, 1::2], powers.abs())
        values[:, 3:] *= _sign(powers[:, 1:2])
    return values


class _GroupRational(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor, terms: bool) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        ctx.terms = terms
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        with torch.autocast(x.device.type, enabled=False):
            blocks = _blocks(rows, numerator, denominator)
            table = _polynomials(blocks, numerator, denominator.abs() if terms else denominator, slopes=False)
            for start in blocks.starts:
                block = blocks.grouped(rows, start)
                top, bottom = _values(table, blocks.powers_of(block), terms).unbind(1)
                top.div_(bottom.abs_().add_(1))
                blocks.grouped(out, start).copy_(top.view(block.shape))
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, numerator, denominator = ctx.saved_tensors
        terms: bool = ctx.terms
        rows, upstream = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        dx = torch.empty_like(rows, memory_format=torch.contiguous_format)
        with torch.autocast(x.device.type, enabled=False):
            blocks = _blocks(rows, numerator, denominator)
            table = _polynomials(blocks, numerator, denominator.abs() if terms else denominator, slopes=True)
            total = torch.zeros(blocks.groups, 2, blocks.degree + 1, dtype=blocks.dtype, device=x.device)
            below = total.new_zeros(blocks.groups, 1, blocks.degree + 1)
            for start in blocks.starts:
                block = blocks.grouped(rows, start)
                powers = blocks.powers_of(block)
                top, bottom, rise, bend = _values(table, powers, terms).unbind(1)
                sign = -_sign(bottom)  # -d|P|/dP
                divisor = bottom.abs_().add_(1)
                # share = dF/d(top)·grad and fall = dF/dP·grad: what each power adds to a's and to b's gradient
                shares = torch.empty_like(powers[:, :2])
                share, fall = shares.unbind(1)
                share.view(block.shape).copy_(blocks.grouped(upstream, start))
                share.div_(divisor)
                torch.mul(top.div_(divisor).mul_(sign), share, out=fall)
                total.baddbmm_(shares, powers.transpose(1, 2))
                if terms:  # of |x|, in the place of what was added for x
                    below += torch.bmm(shares[:, 1:], powers.abs_().transpose(1, 2))
                blocks.grouped(dx, start).copy_(rise.mul_(share).addcmul_(bend, fall).view(block.shape))
        da = _rows_of(total[:, 0, : numerator.shape[1]], numerator)
        db = _rows_of((below[:, 0] if terms else total[:, 1])[:, 1 : denominator.shape[1] + 1], denominator)
        return dx.view(x.shape), da, db * _sign(denominator) if terms else db, None


def _blocks(rows: Tensor, numerator: Tensor, denominator: Tensor) -> _Blocks:
    groups = max(len(numerator), len(denominator))
    return _Blocks(rows, groups, max(numerator.shape[1] - 1, denominator.shape[1], 1))


def _rows_of(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of each group's row, summed where the groups share one."""
    return (gradient.sum(0, keepdim=True) if len(like) < len(gradient) else gradient).to(like.dtype)


class Rational(nn.Module, ABC):
    """What both kinds of group-rational functions share; a kind gives its parameters and says if it is of `terms`."""

    terms: ClassVar[bool] = False

    def __init__(self, groups: int, m: int, n: int, init: str) -> None:
        super().__init__()
        for name, value in (("groups", groups), ("m", m), ("n", n)):
            check_count("GroupRational", name, value, 1)
        self.groups, self.m, self.n, self.init = groups, m, n, init

    @abstractmethod
    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Numerator (g or 1, m+1) and denominator (g or 1, n), the parameters or views of them."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every function to the fit to `init`."""
        for mine, fit in zip(self.coefficients(), fit_rational(self.init, self.m, self.n, self.terms), strict=True):
            mine.copy_(torch.tensor(fit).expand_as(mine))

    def gain(self) -> float:
        """α of the function at its start, see `rational_fit.gain`."""
        return gain(self.init, self.m, self.n, self.terms)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        """(...,C) -> (...,C)."""
        return group_rational(x, *self.coefficients(), self.terms)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, m={self.m}, n={self.n}, init={self.init}"


class GroupRational(Rational):
    """A rational function for each of `groups` groups of channels; the denominator is common to all (KAT, §4.3).

    F_g(x) = (Σ_{i=0..m} a_gi x^i) / (1 + |Σ_{j=1..n} b_j x^j|). At the start every F_g is the best fit to `init`:
    "identity", "gelu" or "silu". The coefficients are stored flat, (g·(m+1),) and (n,) or (g·n,): timm's optimisers
    spare vectors from weight decay, which would pull F towards zero.

    Args:
        groups: g, a divisor of the number of channels.
        m, n: degrees of numerator and denominator.
        init: the function to begin as.
        share_denominator: one b for all groups, as KAT's paper has it in its experiments, or one for each.

    Raises ValueError for a value out of range or an unknown `init`.
    """

    def __init__(
        self, groups: int = 8, m: int = 5, n: int = 4, init: str = "gelu", share_denominator: bool = True
    ) -> None:
        super().__init__(groups, m, n, init)
        self.share_denominator = share_denominator
        self.numerator = nn.Parameter(torch.empty(groups * (m + 1)))
        self.denominator = nn.Parameter(torch.empty(n if share_denominator else groups * n))
        self.reset_parameters()

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """As Rational.coefficients."""
        return self.numerator.view(-1, self.m + 1), self.denominator.view(-1, self.n)


class PublishedRational(Rational):
    """The same as KAT's published code computes it (github.com/Adamdad/rational_kat_cu), under its parameters' names.

    F_g(x) = (Σ_{i=0..m} a_i x^i) / (1 + Σ_{j=1..n} |b_gj x^j|): the numerator is common to all groups, each has its
    denominator. Tables (1,m+1) and (g,n), which weight decay reaches, as there. Otherwise as GroupRational; the start
    is the fit to `init` of this form, where the code's own constants fit the other.
    """

    terms = True

    def __init__(self, groups: int = 8, m: int = 5, n: int = 4, init: str = "gelu") -> None:
        super().__init__(groups, m, n, init)
        self.weight_numerator = nn.Parameter(torch.empty(1, m + 1))
        self.weight_denominator = nn.Parameter(torch.empty(groups, n))
        self.reset_parameters()

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """As Rational.coefficients."""
        return self.weight_numerator, self.weight_denominator
