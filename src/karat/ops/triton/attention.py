"""Basis attention and joint attention in Triton kernels: what they serve, and the way to them.

Triton itself is imported by the first call that is served, never by looking whether a call could be.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from karat.basis import Basis
from karat.basis.bspline import BSpline
from karat.basis.fourier import Fourier
from karat.basis.rational import Rational
from karat.basis.wavelets import DerivativeOfGaussian, MexicanHat, Meyer, Morlet, Shannon
from karat.ops.call import Call, Gradients, Needs
from karat.ops.softmax_part import SoftmaxPart

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What subclasses one of them has functions of its own.
FAMILIES = (Fourier, BSpline, Rational, MexicanHat, Morlet, DerivativeOfGaussian, Meyer, Shannon)
ACTIVATIONS = ("zero", "identity", "silu", "gelu")
LARGEST_HEAD = 128
# The kernel writes a spline as a sum of truncated powers, whose terms cancel more and more with the order.
LARGEST_ORDER = 7


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(call: Call, u: Tensor, basis: Basis, v: Tensor | None = None) -> str | None:
    """Why the kernels can't serve such a call, or None if they can."""
    q = call.q
    if q.device.type != "cuda" and not (q.device.type == "cpu" and _interpreted()):
        return f"Triton kernels need a CUDA device, the inputs are on {q.device}"
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    nvidia = q.device.type == "cuda" and not torch.version.hip  # AMD's: compiled for gfx942, neither run nor timed yet
    if nvidia and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "Triton kernels need an NVIDIA GPU of compute capability 8.0 or above, or an AMD GPU"
    if q.dtype not in DTYPES or u.dtype not in DTYPES:
        return f"Triton kernels take float32, bfloat16 and float16, got {q.dtype} and {u.dtype}"
    widest = max(q.shape[-1], 0 if v is None else v.shape[-1])
    if widest > LARGEST_HEAD:
        return f"Triton kernels take head dimensions up to {LARGEST_HEAD}, got {widest}"
    base, family = basis.parts
    if type(family) not in FAMILIES or base not in ACTIVATIONS:
        names = (*(known.name for known in FAMILIES), *ACTIVATIONS[1:])
        return f"Triton kernels know {', '.join(names)}, not {basis}"
    if isinstance(family, BSpline) and family.order > LARGEST_ORDER:
        return f"Triton kernels take splines up to order {LARGEST_ORDER}, got {family.order}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def about() -> str:
    """What this is, in words."""
    return "Triton"


def forward(call: Call, u: Tensor, basis: Basis, softmax: SoftmaxPart | None = None) -> Tensor:
    """out (B,H,M,E) in q's dtype; see `karat.basis_attention`."""
    from karat.ops.triton import launch
    from karat.ops.triton.arguments import Arguments

    return launch.forward(Arguments(call, u, basis, softmax))


def backward(
    grad: Tensor, call: Call, u: Tensor, basis: Basis, needs: Needs, softmax: SoftmaxPart | None = None
) -> Gradients:
    """Gradients for q, k, u and bias (`needs` says which), given that of the output, `grad` (B,H,M,E)."""
    from karat.ops.triton import launch
    from karat.ops.triton.arguments import Arguments

    return launch.backward(Arguments(call, u, basis, softmax, grad.to(call.q.dtype)), needs)
