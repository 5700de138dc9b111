"""The plane of a path: distances kept, directions of length one, what lies outside the plane said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from karat.analyze.trajectory import Plane, principal_plane
from karat.runs.files import write_tensors

SHAPES = {"first": (3, 4), "second": (5,)}


def planted(tmp_path: Path, points: Tensor, noise: float = 0.0) -> tuple[list[tuple[int, Path]], dict[str, Tensor]]:
    """Checkpoints at points (T,2) of a random plane, the last one's weights beside them."""
    size = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    axes = torch.linalg.qr(torch.randn(size, 3, dtype=torch.float64)).Q.T
    origin = torch.randn(size, dtype=torch.float64)
    paths, weights = [], {}
    for epoch, point in enumerate(points.double()):
        off = noise * (epoch % 2) * axes[2]
        parts = (origin + point @ axes[:2] + off).split([torch.Size(shape).numel() for shape in SHAPES.values()])
        weights = {name: part.view(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}
        paths.append((epoch, tmp_path / f"{epoch}.safetensors"))
        write_tensors(paths[-1][1], weights | {"buffer": torch.zeros(2)})
    return paths, weights


def flat(direction: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in direction.values()])


def test_a_path_in_a_plane_keeps_its_distances(tmp_path: Path) -> None:
    points = torch.randn(6, 2, dtype=torch.float64)
    found = principal_plane(*planted(tmp_path, points))
    torch.testing.assert_close(torch.cdist(found.coordinates, found.coordinates), torch.cdist(points, points))
    torch.testing.assert_close(found.distances, torch.zeros(6, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.explained.sum() == pytest.approx(1)
    assert found.epochs == tuple(range(6))
    assert found.coordinates[-1].abs().max() < 1e-9  # the centre is the last checkpoint


def test_directions_are_orthonormal_and_lead_to_the_checkpoints(tmp_path: Path) -> None:
    checkpoints, centre = planted(tmp_path, torch.randn(3, 2))
    found = principal_plane(checkpoints, centre)
    D = torch.stack([flat(direction) for direction in found.directions])
    torch.testing.assert_close(D @ D.T, torch.eye(2, dtype=torch.float64))
    from karat.runs.files import read_tensors

    for (_, path), point in zip(checkpoints, found.coordinates, strict=True):
        stored = read_tensors(path)
        torch.testing.assert_close(flat(centre) + point @ D, flat({name: stored[name] for name in SHAPES}))


def test_directions_are_those_of_principal_components(tmp_path: Path) -> None:
    from sklearn.decomposition import PCA

    checkpoints, centre = planted(tmp_path, torch.randn(7, 2), noise=0.5)
    found = principal_plane(checkpoints, centre)
    from karat.runs.files import read_tensors

    rows = torch.stack([flat({name: read_tensors(path)[name] for name in SHAPES}) for _, path in checkpoints])
    reference = PCA(2).fit(rows.numpy())
    D = torch.stack([flat(direction) for direction in found.directions])
    torch.testing.assert_close((D @ torch.from_numpy(reference.components_).T).abs(), torch.eye(2).double())
    assert found.explained.tolist() == pytest.approx(reference.explained_variance_ratio_)


def test_distance_from_the_plane_is_reported(tmp_path: Path) -> None:
    """The third direction is left out: what a checkpoint has of it, from the centre, is its distance."""
    points = torch.tensor([[4.0, 0.0], [3.0, 2.0], [1.0, 3.0], [-2.0, 1.0], [0.0, 0.0]])
    checkpoints, centre = planted(tmp_path, points, noise=1e-3)
    found: Plane = principal_plane(checkpoints, centre)
    assert found.distances[1] == pytest.approx(1e-3, rel=0.2)
    assert found.distances[0] == pytest.approx(0, abs=3e-4)


def test_checkpoints_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    checkpoints, centre = planted(tmp_path, torch.tensor([[3.0, 1.0], [1.0, torch.nan], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="NaN or Inf"):
        principal_plane(checkpoints, centre)


def test_a_line_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    checkpoints, centre = planted(tmp_path, torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]]))
    with pytest.raises(ValueError, match="span no plane"):
        principal_plane(checkpoints, centre)
    with pytest.raises(ValueError, match="span no plane"):
        principal_plane(checkpoints[:2], centre)
    with pytest.raises(ValueError, match="no 'third'"):
        principal_plane(checkpoints, centre | {"third": torch.zeros(2)})
