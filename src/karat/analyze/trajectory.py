"""The path that training took through weight space, and the plane that shows most of it.

Nothing here has the size parameters × parameters: directions are combinations of the checkpoints, found from the
Gram matrix of their differences, which is summed up one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

Weights = Mapping[str, Tensor]
Direction = dict[str, Tensor]


@dataclass(frozen=True)
class Plane:
    """Two directions of unit length through `centre`, at right angles, and where the checkpoints lie.

    coordinates (T,2) and distances (T,) are in units of weight space: checkpoint t's foot in the plane is
    centre + x_t d_1 + y_t d_2, and distances[t] is how far the checkpoint lies from it. `explained` (2,) is each
    direction's share of the path's variance. epochs (T,).
    """

    directions: tuple[Direction, Direction]
    coordinates: Tensor
    distances: Tensor
    explained: Tensor
    epochs: tuple[int, ...]


def gram(paths: Sequence[Path], centre: Weights) -> Tensor:
    """⟨θ_s - c, θ_t - c⟩ for checkpoints θ and a centre c: (T,T), float64.

    Read tensor by tensor, so that T copies of one tensor are all that is held. Only the names in `centre` count.
    Raises ValueError for a checkpoint that lacks one of them.
    """
    total = torch.zeros(len(paths), len(paths), dtype=torch.float64)
    for _, rows in _differences(paths, centre):
        total += rows @ rows.T
    return total


def principal_plane(checkpoints: Sequence[tuple[int, Path]], centre: Weights) -> Plane:
    """The plane through `centre` along the two main PCA directions of the path (Li et al. 2018, §7.2).

    `centre` holds the trainable weights by name, usually the last checkpoint's, or the averaged ones; the directions
    are those of the checkpoints around their mean.

    Raises ValueError for a path that spans no plane.
    """
    paths = [path for _, path in checkpoints]
    G = gram(paths, centre)
    if not G.isfinite().all():
        raise ValueError("the trajectory's checkpoints hold NaN or Inf: they span no plane")
    T = len(paths)
    centring = torch.eye(T, dtype=torch.float64) - 1 / T
    values, vectors = torch.linalg.eigh(centring @ G @ centring)
    if T < 3 or values[-2] <= 1e-12 * values[-1].clamp_min(1e-300):
        raise ValueError(
            f"{T} trajectory checkpoints span no plane: two epochs of training or more are needed (three checkpoints "
            "with the start), with weights that move"
        )
    values, vectors = values.flip(0), vectors.flip(1)
    mixes = centring @ vectors[:, :2] / values[:2].sqrt()  # (T,2): d = Σ_t mix_t (θ_t - c) has length one
    # the path's first point lies on the positive side of both: pictures don't flip by chance
    mixes = mixes * torch.where((G @ mixes)[0] < 0, -1.0, 1.0).double()
    coordinates = G @ mixes
    squares = G.diagonal() - coordinates.square().sum(1)
    rounding = 1e-13 * G.diagonal().max()  # the difference of two large numbers: what lies below is noise
    squares = torch.where(squares > rounding, squares, 0)
    first, second = _combine(paths, centre, mixes)
    return Plane(
        directions=(first, second),
        coordinates=coordinates,
        distances=squares.sqrt(),
        explained=values[:2] / values.clamp_min(0).sum(),
        epochs=tuple(epoch for epoch, _ in checkpoints),
    )


def _combine(paths: Sequence[Path], centre: Weights, mixes: Tensor) -> tuple[Direction, Direction]:
    found: tuple[Direction, Direction] = ({}, {})
    for name, rows in _differences(paths, centre):
        for direction, mix in zip(found, mixes.T, strict=True):
            direction[name] = (mix @ rows).reshape(centre[name].shape).to(centre[name].dtype)
    return found


def _differences(paths: Sequence[Path], centre: Weights) -> Iterator[tuple[str, Tensor]]:
    """θ_t - c of one tensor after another, (T,numbers) each."""
    for name, value in centre.items():
        rows = torch.stack([_read(path, name) for path in paths]).flatten(1).double()
        yield name, rows - value.detach().cpu().double().flatten()


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        if name not in names:
            raise ValueError(f"{path} has no {name!r}, which the model has: it belongs to another model")
        return file.get_tensor(name)
