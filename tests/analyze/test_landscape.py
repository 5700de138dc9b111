"""The loss on a plane: the trained loss at the origin, the checkpoints' losses on the path, points kept on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import karat
from karat.analyze.directions import filter_axes, random_directions
from karat.analyze.landscape import (
    Surface,
    axes_around,
    axis_through_zero,
    evaluate,
    loss_surface,
    losses_at,
    moved,
    sharpness,
)
from karat.analyze.loading import open_run, trajectory
from karat.analyze.trajectory import principal_plane
from karat.models.kan import GroupRational, SplineLinear
from karat.runs.files import read_tensors

SMALL = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 4}


def test_the_plane_of_three_checkpoints_holds_their_losses(karat_run: Path) -> None:
    run = open_run(karat_run)
    model = run.model()
    samples = run.samples(24, "train")
    centre = {name: p.detach() for name, p in model.named_parameters()}
    checkpoints = trajectory(karat_run)
    assert len(checkpoints) == 3
    plane = principal_plane(checkpoints, centre)
    assert plane.distances.max() < 1e-3 * plane.coordinates.abs().max()
    below = losses_at(model, plane.directions, plane.coordinates, samples.images, samples.labels)
    for (_, path), loss in zip(checkpoints, below, strict=True):
        other = run.model()
        other.load_state_dict(read_tensors(path))
        assert float(loss) == pytest.approx(evaluate(other, samples.images, samples.labels)[0], abs=1e-5)
    x, y = axes_around(plane.coordinates, 3)
    surface = loss_surface(model, plane.directions, x, y, samples.images, samples.labels)
    at = int((y == 0).nonzero()), int((x == 0).nonzero())
    loss, top1 = evaluate(run.model(), samples.images, samples.labels)
    assert float(surface.loss[at]) == pytest.approx(loss, abs=1e-6)
    assert float(surface.top1[at]) == pytest.approx(top1)


def test_moving_is_linear_and_weights_and_buffers_come_back() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    directions = tuple({"0.weight": torch.randn(2, 3)} for _ in range(2))
    with moved(model, directions) as put:
        put((2.0, -0.5))
        expected = before["0.weight"] + 2 * directions[0]["0.weight"] - 0.5 * directions[1]["0.weight"]
        torch.testing.assert_close(model[0].weight.data, expected)
        put((0.0, 0.0))
        assert torch.equal(model[0].weight, before["0.weight"])
        put((1.0, 1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(TypeError), moved(model, directions) as put:
        put((1.0, "far"))  # type: ignore[arg-type]
    assert torch.equal(model[0].weight, before["0.weight"])


class Parabola(nn.Module):
    """Logits whose cross-entropy is ln(1 + e^-(θ²)) for label 0."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2))
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return torch.stack([self.theta.square().sum(), torch.zeros(())]).expand(len(x), 2)


def test_points_on_disk_are_not_computed_again(tmp_path: Path) -> None:
    model, cache = Parabola(), tmp_path / "deep" / "points.jsonl"
    directions = ({"theta": torch.tensor([1.0, 0.0])}, {"theta": torch.tensor([0.0, 1.0])})
    x, y = axis_through_zero(-1, 1, 5), axis_through_zero(-1, 2, 4)
    data = torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)
    seen: list[tuple[int, int]] = []
    first = loss_surface(model, directions, x, y, *data, cache=cache, progress=lambda *at: seen.append(at))
    expected = torch.log1p(torch.exp(-(y[:, None] ** 2 + x**2)))
    torch.testing.assert_close(first.loss, expected, atol=1e-6, rtol=1e-6)
    assert model.passes == 20
    assert (seen[0], seen[-1], len(seen)) == ((0, 20), (20, 20), 21)
    lines = cache.read_text().splitlines()
    cache.write_text("\n".join(lines[:12]) + "\n" + lines[12][:7])  # interrupted while it wrote
    again = loss_surface(model, directions, x, y, *data, cache=cache)
    assert torch.equal(again.loss, first.loss)
    assert model.passes == 20 + 8
    assert sorted(cache.read_text().splitlines()) == sorted(lines)
    cache.write_text(json.dumps({"no": "points"}) + "\n")
    with pytest.raises(ValueError, match=r"points\.jsonl doesn't hold landscape points"):
        loss_surface(model, directions, x, y, *data, cache=cache)


@pytest.mark.parametrize(("low", "high", "points"), [(-1, 1, 21), (-0.1, 5, 4), (-3, 0.5, 10), (-1, 1e-3, 3)])
def test_axes_hold_zero_and_reach_far_enough(low: float, high: float, points: int) -> None:
    axis = axis_through_zero(low, high, points)
    assert len(axis) == points
    assert (axis == 0).sum() == 1
    assert axis[0] <= low * (1 - 1e-9)
    assert axis[-1] >= high * (1 - 1e-9)
    assert axis.diff().std() < 1e-9 * (high - low)


def test_bad_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 points or more a side, got 2"):
        axis_through_zero(-1, 1, 2)
    with pytest.raises(ValueError, match="must reach over 0"):
        axis_through_zero(1, 2, 5)


def test_sharpness_of_shapes_that_are_known() -> None:
    axis = axis_through_zero(-1, 1, 21)
    bowl = (axis[:, None] ** 2 + axis**2).double()
    found = sharpness(Surface(axis, axis, bowl, bowl), radius=0.5)
    assert found["epsilon_sharpness"] == pytest.approx(25, abs=1e-9)  # 100 (0.25 - 0)/(1 + 0)
    noise = torch.rand(21, 21, dtype=torch.float64)
    spiky = sharpness(Surface(axis, axis, noise, noise))["spikiness"]
    assert found["spikiness"] < 0.05 < 0.9 < spiky < 1.3
    flat = torch.ones(21, 21, dtype=torch.float64)
    assert sharpness(Surface(axis, axis, flat, flat))["spikiness"] == 0
    bowl[0, 0] = torch.inf
    assert sharpness(Surface(axis, axis, bowl, bowl), radius=0.5) == pytest.approx(found, rel=0.2)
    with pytest.raises(ValueError, match="no finite loss"):
        sharpness(Surface(axis, axis, flat * torch.nan, flat))


def kan_mlp() -> nn.Module:
    return nn.Sequential(SplineLinear(4, 3), GroupRational(1), nn.Linear(3, 2))


@pytest.mark.parametrize(
    "model",
    [
        lambda: karat.create_model("vit_tiny_patch16_224", attention="g2b,rank=2,edge_scales=True", **SMALL),
        lambda: karat.create_model("vit_tiny_patch16_224", attention="dog-u,order=PhiPhi,rank=2", **SMALL),
        kan_mlp,
    ],
)
def test_random_directions_have_the_filters_lengths(model) -> None:
    built = model()
    axes = filter_axes(built)
    parameters = dict(built.named_parameters())
    assert set(axes) == {name for name, p in parameters.items() if p.requires_grad}
    first, second = random_directions(built, seed=3)
    assert all(torch.equal(first[name], again) for name, again in random_directions(built, seed=3)[0].items())
    for name, kept in axes.items():
        weight = parameters[name].detach()
        if kept is None:
            assert weight.dim() == 1
            assert not first[name].any()
            continue
        assert not torch.equal(first[name], second[name]) or not weight.any()
        order = (*kept, *(axis for axis in range(weight.dim()) if axis not in kept))
        mine, own = (t.permute(order).flatten(len(kept)).norm(dim=-1) for t in (first[name], weight))
        torch.testing.assert_close(mine, own)


def test_a_filter_of_kan_coefficients_is_one_output_of_one_head() -> None:
    model = karat.create_model("vit_tiny_patch16_224", attention="g2b,rank=2", **SMALL)
    axes = filter_axes(model)
    name = next(name for name in axes if name.endswith("coefficients"))
    assert axes[name] == (0, 3)  # (H,F,Q,P): over features and keys together
    assert axes["blocks.0.attn.operator.W"] == (0, 1)
    assert axes["blocks.0.attn.qkv.weight"] == (0,)
    assert filter_axes(kan_mlp())["0.coefficients"] == (2,)
