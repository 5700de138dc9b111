"""Curvature of the loss: top eigenvalues and trace of the Hessian, by products with vectors alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from karat.models.evaluating import evaluating
from karat.models.kan.plain import plain
from karat.share.export.graph import plain_path

Closure = Callable[[], Tensor]  # the loss, a scalar, with a graph to differentiate twice


@dataclass(frozen=True)
class Curvature:
    """eigenvalues (k,), the largest ones in magnitude, descending; trace and its standard error."""

    eigenvalues: Tensor
    trace: float
    trace_error: float


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Within the block the whole model has second derivatives: attention by the reference path of basis attention or
    by unfused softmax, KAN layers by their plain formulas (the fused ways have first derivatives only)."""
    with plain_path(model), sdpa_kernel(SDPBackend.MATH), plain():
        yield


def loss_closure(model: nn.Module, images: Tensor, labels: Tensor) -> Closure:
    """The mean cross-entropy of the model on images (B,C,S,S) and labels (B,)."""
    return lambda: nn.functional.cross_entropy(model(images), labels)


class Hessian:
    """H v for the Hessian H of a loss by the parameters, through one graph of the gradient that is kept.

    Args:
        loss: called once; the graph is held as long as this object.
        parameters: those to differentiate by; others are constants. One that the loss doesn't depend on has zeros.
    """

    def __init__(self, loss: Closure, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("the Hessian needs at least one parameter that is trained")
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.gradients = torch.autograd.grad(loss(), self.parameters, create_graph=True, materialize_grads=True)

    @property
    def size(self) -> int:
        """P, how many numbers the parameters hold."""
        return sum(self.sizes)

    def times(self, vector: Tensor) -> Tensor:
        """H v: (P,) -> (P,), in float64 whatever the parameters are."""
        parts = [part.view_as(p).to(p) for part, p in zip(vector.split(self.sizes), self.parameters, strict=True)]
        followed = [(g, part) for g, part in zip(self.gradients, parts, strict=True) if g.requires_grad]
        if not followed:  # a loss that is linear in all of them
            return vector.new_zeros(self.size, dtype=torch.float64)
        products = torch.autograd.grad(
            [g for g, _ in followed],
            self.parameters,
            [part for _, part in followed],
            retain_graph=True,
            materialize_grads=True,
        )
        found = torch.cat([product.detach().flatten().double() for product in products])
        if not found.isfinite().all():
            raise ValueError("the loss has no finite second derivatives at these weights")
        return found


def top_eigenvalues(
    hessian: Hessian, count: int = 3, *, tolerance: float = 1e-3, seed: int = 0, which: Literal["LM", "LA"] = "LM"
) -> Tensor:
    """The `count` eigenvalues of largest magnitude, descending by value, to a relative `tolerance` (Lanczos).

    which: "LA" takes the algebraically largest ones instead, where negative curvature isn't asked for.

    Raises ValueError for fewer than 1 or not fewer than P.
    """
    if not 1 <= count < hessian.size:
        raise ValueError(f"count must lie between 1 and {hessian.size - 1}, got {count}")

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        return hessian.times(torch.from_numpy(np.array(vector).ravel())).numpy()

    operator = LinearOperator((hessian.size,) * 2, matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(hessian.size)
    if not product(start).any():  # H = 0, as with one class: nothing for Lanczos to begin with
        return torch.zeros(count, dtype=torch.float64)
    values = eigsh(operator, k=count, which=which, tol=tolerance, v0=start, return_eigenvectors=False)
    return torch.from_numpy(np.sort(values)[::-1].copy())


def trace(hessian: Hessian, samples: int = 10, *, seed: int = 0) -> tuple[float, float]:
    """The Hessian's trace and its standard error, from `samples` random signs v: E[vᵀHv] (Hutchinson 1990)."""
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(samples):
        signs = torch.randint(0, 2, (hessian.size,), generator=generator).double() * 2 - 1
        found.append(float(signs @ hessian.times(signs)))
    values = torch.tensor(found, dtype=torch.float64)
    error = float(values.std()) / math.sqrt(samples) if samples > 1 else math.nan
    return float(values.mean()), error


def curvature(
    model: nn.Module, images: Tensor, labels: Tensor, *, count: int = 3, samples: int = 10, seed: int = 0
) -> Curvature:
    """Top eigenvalues and trace of the loss's Hessian by all trained parameters, on images (B,C,S,S), labels (B,).

    One graph of the gradient on all the images is held: choose few of them. In evaluation mode.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model), twice_differentiable(model):
        hessian = Hessian(loss_closure(model, images, labels), parameters)
        eigenvalues = top_eigenvalues(hessian, count, seed=seed)
        mean, error = trace(hessian, samples, seed=seed)
    return Curvature(eigenvalues, mean, error)
