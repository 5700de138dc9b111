"""The table of implementations of basis attention and joint attention, and how "auto" chooses."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Protocol, cast

from torch import Tensor

from karat.basis import Basis
from karat.ops.call import Call, Gradients, Needs
from karat.ops.softmax_part import SoftmaxPart


class Implementation(Protocol):
    """A module with these functions; u and what they return as in `karat.basis_attention`.

    With a `SoftmaxPart` they do joint attention: its results go to the memory that it names.
    """

    def forward(self, call: Call, u: Tensor, basis: Basis, softmax: SoftmaxPart | None = None) -> Tensor:
        """The sums (B,H,M,E), in q's dtype."""
        ...

    def backward(
        self, grad: Tensor, call: Call, u: Tensor, basis: Basis, needs: Needs, softmax: SoftmaxPart | None = None
    ) -> Gradients:
        """Gradients, given that of the sums, `grad` (B,H,M,E)."""
        ...

    def unsupported(self, call: Call, u: Tensor, basis: Basis, v: Tensor | None = None) -> str | None:
        """Why this implementation can't serve such a call, or None if it can; v is there in joint attention. Must not
        import or build anything heavy for a call that it would refuse."""
        ...

    def about(self) -> str:
        """What it is, and what its kernel was made for, in words."""
        ...


# name -> module, imported when first asked for. "reference" isn't here: it's ordinary PyTorch, outside the operator.
IMPLEMENTATIONS: dict[str, str] = {
    "triton": "karat.ops.triton.attention",
    "cpp": "karat.ops.cpp.attention",
    "tiled": "karat.ops.tiled.attention",
}

# Those whose kernel has the projector of `karat.ops.attend` inside: name -> module with `forward` and `backward`. The
# others are followed by it (by_parts.py).
PROJECTED: dict[str, str] = {"cpp": "karat.ops.cpp.attend"}

# What "auto" tries first, in order, by device; then "tiled", which serves everything.
PREFERENCE: dict[str, tuple[str, ...]] = {"cuda": ("triton",), "cpu": ("cpp",)}


@cache
def load(name: str) -> Implementation:
    """The implementation of that name."""
    return cast(Implementation, importlib.import_module(IMPLEMENTATIONS[name]))


@cache
def load_projected(name: str) -> ModuleType:
    """Its kernel with the projector inside."""
    return importlib.import_module(PROJECTED[name])


def choose(impl: str, call: Call, u: Tensor, basis: Basis, v: Tensor | None = None) -> Implementation:
    """The implementation to use. Raises ValueError if a named one can't serve the call, saying which can."""
    return load(choice(impl, call, u, basis, v))


def choice(impl: str, call: Call, u: Tensor, basis: Basis, v: Tensor | None = None) -> str:
    """The name of that implementation."""
    if impl != "auto":
        reason = load(impl).unsupported(call, u, basis, v)
        if reason is not None:
            able = [name for name in IMPLEMENTATIONS if load(name).unsupported(call, u, basis, v) is None]
            raise ValueError(
                f"impl={impl!r} can't serve this call: {reason}; use impl='auto' or one of reference, {', '.join(able)}"
            )
        return impl
    names = PREFERENCE.get(call.q.device.type, ())
    return next((name for name in names if load(name).unsupported(call, u, basis, v) is None), "tiled")


def projecting(impl: str, call: Call, u: Tensor, basis: Basis, v: Tensor | None = None) -> bool:
    """Whether one of `PROJECTED` can serve a call that leaves the choice to it, or names it."""
    return any(impl in ("auto", name) and load(name).unsupported(call, u, basis, v) is None for name in PROJECTED)


def about(impl: str, basis: Basis, like: Tensor) -> str:
    """What serves plain calls with this basis on a tensor's device and in its precision, in words."""
    if impl == "reference":
        return "PyTorch, by the definition"
    q, u = like.new_empty(1, 1, 1, 1), like.new_empty(1, basis.num_parameters, 1, 1)
    return choose(impl, Call(q, q, 1.0), u, basis).about()
