"""What looks through a call: torch.func and forward mode, which only what is written in PyTorch can serve.

A kernel has a gradient and nothing else. PyTorch would drop a tangent on the way without a word, and wants more of an
operator than a gradient to batch it or to differentiate it in its functional way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


def looked_through(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is at work, or one of these carries a tangent of forward mode."""
    return torch._C._are_functorch_transforms_active() or with_tangents(*tensors)


def with_tangents(*tensors: Tensor | None) -> bool:
    """Whether one of these carries a tangent; while compiling, whether one could."""
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():
        return True
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def serving(impl: str, *tensors: Tensor | None) -> str:
    """The implementation for a call: the named one, where "auto" stands for the reference if it's looked through.

    Raises ValueError where it is and a kernel was named.
    """
    if impl == "reference" or not looked_through(*tensors):
        return impl
    if impl != "auto":
        raise ValueError(
            f"impl={impl!r} has gradients alone, no torch.func transforms and no forward mode; "
            "use impl='reference', or 'auto', which turns to it by itself"
        )
    return "reference"


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise where a gradient of a kernel's is to be differentiated in forward mode."""
    if with_tangents(*tensors):
        raise RuntimeError(
            "gradients of basis attention have a forward mode in its reference implementation only; "
            "use impl='reference'"
        )


def observed(*tensors: Tensor | None) -> bool:
    """Whether more than autograd looks on: a compiler, an exporter, a mode such as the FLOP counter, torch.func, or a
    tensor of a kind of its own."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return True
    return any(x is not None and _is_special(x) for x in tensors)


def _is_special(x: Tensor) -> bool:
    """Whether a tensor is more, or less, than its memory says; batched gradients are of an old kind of torch's.

    A view that is yet to be negated (`z.conj().imag`) and zeros without memory are made whole by the dispatcher alone.
    """
    if type(x) not in _PLAIN or x.is_meta or x.is_neg() or torch._C._functorch.is_legacy_batchedtensor(x):
        return True
    return torch._is_zerotensor(x)
