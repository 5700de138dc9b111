"""The numbers of sharpness against losses whose rise and Hessian are known in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from karat import runs
from karat.analyze.analysis import FOLDER
from karat.runs.checkpoint import MODEL
from karat.runs.files import write_json
from karat.study import measures
from karat.study.measures import HEADINGS, MEASURES, largest_eigenvalue, loss_rise, read_measures


class Weighed(nn.Module):
    """Logits (0, x w_1, ..., x w_C-1) of inputs x (B,K) under a matrix w (C-1,K)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight)
        with torch.no_grad():
            self.linear.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x)
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)


def test_the_largest_eigenvalue_of_logistic_regression() -> None:
    # H = mean over images of p (1 - p) x xT, whatever the labels are
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64) * torch.arange(1.0, 7.0).double()
    weight = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    x, w = inputs.numpy(), weight.numpy()[0]
    p = 1 / (1 + np.exp(-x @ w))
    hessian = (x * (p * (1 - p))[:, None]).T @ x / len(x)
    for labels in (torch.zeros(40, dtype=torch.long), torch.arange(40) % 2):
        found = largest_eigenvalue(Weighed(weight), inputs, labels)
        assert found == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-2)


@pytest.mark.parametrize(("label", "largest"), [(0, 1.0), (1, 0.25)])
def test_the_largest_eigenvalue_is_not_the_longest_negative_one(label: int, largest: float) -> None:
    # logit a^2 + b at a = b = 0, where p = 1/2: d2L/da2 = 2 (p - label) = 1 or -1, d2L/db2 = p (1 - p) = 1/4
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            logit = x[:, 0] * (self.weights[0] ** 2 + self.weights[1])
            return torch.stack([torch.zeros_like(logit), logit], dim=1)

    images = torch.ones(3, 1, dtype=torch.float64)
    found = largest_eigenvalue(Squared(), images, torch.full((3,), label))
    assert found == pytest.approx(largest, rel=1e-2)


def test_a_quadratic_loss_rises_by_half_of_its_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    # L = |w|^2 / 2 + 5 w_11: over both signs all parts that are odd in the step cancel, and |d| = |w| by normalisation
    def loss(model: nn.Module, *_: object) -> tuple[float, float]:
        weight = model.linear.weight.detach()  # type: ignore[union-attr, operator]
        return float(weight.square().sum() / 2 + 5 * weight[0, 0]), 0.0

    monkeypatch.setattr(measures, "evaluate", loss)
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    model = Weighed(weight)
    nothing = torch.empty(0)
    for radius in (0.1, 0.5):
        for planes in (1, 3):
            found = loss_rise(model, nothing, nothing, radius=radius, planes=planes)
            assert found == pytest.approx(radius**2 * float(weight.square().sum()) / 2, rel=1e-9)
    assert torch.equal(model.linear.weight, weight)


def test_the_rise_of_cross_entropy_of_one_weight() -> None:
    # one filter of one weight: d = +w or -w, so that both ways together are w (1 + r) and w (1 - r)
    weight = torch.tensor([[1.5]], dtype=torch.float64)
    images = torch.tensor([[0.7], [-2.0], [1.1]], dtype=torch.float64)
    labels = torch.tensor([1, 0, 0])

    def loss(w: float) -> float:
        signs = np.where(labels.numpy() == 1, 1, -1)
        return float(np.mean(np.log1p(np.exp(-signs * images.numpy()[:, 0] * w))))

    expected = (loss(1.5 * 1.1) + loss(1.5 * 0.9)) / 2 - loss(1.5)
    assert loss_rise(Weighed(weight), images, labels, radius=0.1) == pytest.approx(expected, rel=1e-6)


def test_numbers_that_lack_a_measure_count_as_none(tmp_path: Path) -> None:
    write_json(tmp_path / runs.DIGESTS, {MODEL: ["0"]})
    (tmp_path / FOLDER).mkdir()
    numbers: dict[str, float | None] = {**dict.fromkeys(HEADINGS), "map_faithfulness": 0.5}
    for kept in (numbers, {"map_faithfulness": 0.5}):
        write_json(tmp_path / FOLDER / MEASURES, {"key": measures._key(tmp_path), "numbers": kept})
        assert read_measures(tmp_path) == (kept if kept is numbers else None)
