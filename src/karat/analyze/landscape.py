"""The loss around trained weights, on a plane: a grid of points that is kept on disk and gone on with."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from karat.analyze.trajectory import Direction
from karat.models.evaluating import evaluating

Progress = Callable[[int, int], None]  # points done, points in all


@dataclass(frozen=True)
class Surface:
    """Loss and top-1 (%) at centre + x d_1 + y d_2: x (X,), y (Y,), loss and top1 (Y,X)."""

    x: Tensor
    y: Tensor
    loss: Tensor
    top1: Tensor


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 128) -> tuple[float, float]:
    """Mean cross-entropy and top-1 in percent on images (B,C,S,S) and labels (B,), in evaluation mode."""
    loss, hits = 0.0, 0
    with evaluating(model):
        for part, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = model(part).double()
            loss += float(nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            hits += int((logits.argmax(1) == wanted).sum())
    return loss / len(labels), 100 * hits / len(labels)


@contextmanager
def moved(model: nn.Module, directions: Sequence[Direction]) -> Iterator[Callable[[Sequence[float]], None]]:
    """Gives a function that puts the model at θ + Σ_i a_i d_i; afterwards its own weights are back, bit for bit.

    Buffers, and parameters that the directions don't name, stay as they are.
    """
    parameters = dict(model.named_parameters())
    names = list(directions[0])
    targets = [parameters[name].detach() for name in names]  # unlike .data they tell of changes to who keeps copies
    own = [target.clone() for target in targets]
    steps = [[direction[name].to(own_) for name, own_ in zip(names, own, strict=True)] for direction in directions]

    def put(at: Sequence[float]) -> None:
        torch._foreach_copy_(targets, own)
        for a, step in zip(at, steps, strict=True):
            if a:
                torch._foreach_add_(targets, step, alpha=a)

    try:
        yield put
    finally:
        torch._foreach_copy_(targets, own)


def axes_around(coordinates: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Grid axes (points,) that cover a path (T,2) and the origin with a quarter of margin, 0 being one of the points.

    Raises ValueError for fewer than 3 points.
    """
    axes = []
    for along in coordinates.double().T:
        low, high = min(float(along.min()), 0.0), max(float(along.max()), 0.0)
        reach = max((high - low) / 4, 1e-6)
        axes.append(axis_through_zero(low - reach, high + reach, points))
    return axes[0], axes[1]


def axis_through_zero(low: float, high: float, points: int) -> Tensor:
    """Evenly spaced points (points,) that cover [low, high] around 0 about as they are asked, with 0 among them."""
    if points < 3:
        raise ValueError(f"a landscape needs 3 points or more a side, got {points}")
    if not low < 0 < high:
        raise ValueError(f"the axis must reach over 0, got {low:g} to {high:g}")
    before = min(max(round((points - 1) * -low / (high - low)), 1), points - 2)
    step = max(-low / before, high / (points - 1 - before))
    return (torch.arange(points, dtype=torch.float64) - before) * step


def loss_surface(
    model: nn.Module,
    directions: tuple[Direction, Direction],
    x: Tensor,
    y: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Surface:
    """The loss at every point of the grid x (X,) × y (Y,); (0, 0) is the model as it is.

    With `cache`, a file, each point is written as soon as it is known, and one that is there already isn't computed
    again; the file must belong to the same model, data and axes (`cache_key` makes a name of them). A last line that
    was torn by an interruption is dropped.
    """
    done = _read_points(cache)
    points = [(j, i) for j in range(len(y)) for i in range(len(x))]
    missing = [point for point in points if point not in done]
    if progress:
        progress(len(points) - len(missing), len(points))
    with moved(model, directions) as put:
        for count, (j, i) in enumerate(missing, start=1):
            put((float(x[i]), float(y[j])))
            done[j, i] = evaluate(model, images, labels)
            if cache is not None:
                _append(cache, j, i, done[j, i])
            if progress:
                progress(len(points) - len(missing) + count, len(points))
    table = torch.tensor([done[point] for point in points], dtype=torch.float64).view(len(y), len(x), 2)
    return Surface(x, y, table[..., 0], table[..., 1])


def losses_at(
    model: nn.Module, directions: tuple[Direction, Direction], coordinates: Tensor, images: Tensor, labels: Tensor
) -> Tensor:
    """The loss at points (T,2) of the plane: (T,)."""
    with moved(model, directions) as put:
        found = []
        for point in coordinates.tolist():
            put(point)
            found.append(evaluate(model, images, labels)[0])
    return torch.tensor(found, dtype=torch.float64)


def cache_key(**settings: Any) -> str:
    """Sixteen letters that stand for everything that a surface depends on; values must be JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def sharpness(surface: Surface, radius: float | None = None) -> dict[str, float]:
    """How sharp and how spiky a surface is, as numbers.

    epsilon_sharpness: 100 · (max L - L(0,0)) / (1 + L(0,0)) over the points within `radius` of the origin (Keskar et
    al. 2017); None: a quarter of the wider axis. spikiness: the root mean square of a point's difference from the
    mean of its four neighbours, in log(1 + L), as a share of the surface's standard deviation there: 0 for a plane,
    small for a smooth bowl, about 1.1 for noise. Points that aren't finite count as the largest finite one.
    """
    loss = surface.loss.clone()
    finite = torch.isfinite(loss)
    if not finite.any():
        raise ValueError("the surface holds no finite loss")
    loss = torch.where(finite, loss, loss[finite].max())
    j, i = int(surface.y.abs().argmin()), int(surface.x.abs().argmin())
    if radius is None:
        radius = float(max(surface.x[-1] - surface.x[0], surface.y[-1] - surface.y[0])) / 4
    near = torch.hypot(surface.y[:, None], surface.x) <= radius
    base = float(loss[j, i])
    logs = loss.clamp_min(0).log1p()
    inner = logs[1:-1, 1:-1]
    around = (logs[:-2, 1:-1] + logs[2:, 1:-1] + logs[1:-1, :-2] + logs[1:-1, 2:]) / 4
    spread = float(logs.std(unbiased=False))
    return {
        "epsilon_sharpness": 100 * (float(loss[near].max()) - base) / (1 + base),
        "spikiness": 0.0 if spread == 0 else math.sqrt(float((inner - around).square().mean())) / spread,
        "radius": radius,
    }


def _read_points(cache: Path | None) -> dict[tuple[int, int], tuple[float, float]]:
    if cache is None or not cache.exists():
        return {}
    text = cache.read_text(encoding="utf-8")
    whole, newline, torn = text.rpartition("\n")
    if torn:  # so that the next line doesn't go on in the middle of it
        cache.write_text(whole + newline, encoding="utf-8")
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        return {(int(j), int(i)): (float(loss), float(top1)) for j, i, loss, top1 in lines}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{cache} doesn't hold landscape points ({error}); remove it to compute them anew") from None


def _append(cache: Path, j: int, i: int, values: tuple[float, float]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a", encoding="utf-8") as file:
        file.write(json.dumps([j, i, *values]) + "\n")
