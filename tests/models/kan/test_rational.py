"""Group-rational functions: the formula, gradients, fits and gains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from karat.models.kan import GroupRational, PublishedRational, group_rational
from karat.models.kan import rational as module
from karat.models.kan.rational import Rational, rational_formula
from karat.models.kan.rational_fit import fit_rational, gain

ROWS = [(4, 1), (1, 4), (4, 4), (1, 1)]


def by_hand(x: Tensor, a: Tensor, b: Tensor, terms: bool = False) -> Tensor:
    """Equation 12 of arXiv 2409.10594, channel by channel; with `terms` what its published code computes."""
    groups = max(len(a), len(b))
    width = x.shape[-1] // groups
    columns = []
    for channel in range(x.shape[-1]):
        z = x[..., channel]
        top = sum(c * z**i for i, c in enumerate(a[channel // width if len(a) > 1 else 0]))
        inner = sum(
            (c * z**j).abs() if terms else c * z**j
            for j, c in enumerate(b[channel // width if len(b) > 1 else 0], start=1)
        )
        columns.append(top / (1 + torch.as_tensor(inner).abs()))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("terms", [False, True], ids=["paper", "code"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("degrees", [(5, 4), (2, 3), (1, 1)], ids=str)
def test_equals_its_formula_and_differentiates(
    rows: tuple[int, int], degrees: tuple[int, int], terms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module._CHUNK, "cpu", 16)  # two rows of eight channels at a time
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    a = torch.randn(rows[0], degrees[0] + 1, dtype=torch.float64, requires_grad=True)
    b = torch.randn(rows[1], degrees[1], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(group_rational(x, a, b, terms), by_hand(x, a, b, terms))
    torch.testing.assert_close(rational_formula(x, a, b, terms), by_hand(x, a, b, terms))
    assert torch.autograd.gradcheck(lambda *given: group_rational(*given, terms), (x, a, b))


def test_any_leading_shape_and_layout() -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64).transpose(0, 1)
    a, b = torch.randn(3, 6, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    torch.testing.assert_close(group_rational(x, a, b), rational_formula(x, a, b))


FORMS = pytest.mark.parametrize("form", [GroupRational, PublishedRational])


@FORMS
@pytest.mark.parametrize(("name", "function"), [("gelu", F.gelu), ("silu", F.silu)])
def test_starts_as_the_activation(name: str, function: object, form: type[Rational]) -> None:
    x = torch.linspace(-3, 3, 8 * 1001, dtype=torch.float64).view(-1, 8)
    layer = form(groups=4, init=name).double()
    assert (layer(x) - function(x)).abs().max() <= 1e-2  # type: ignore[operator]
    far = torch.linspace(-10, 10, 8 * 1001, dtype=torch.float64).view(-1, 8)
    assert (layer(far) - function(far)).abs().max() <= 5e-2  # type: ignore[operator]


@FORMS
def test_identity_is_exact_and_its_denominator_can_learn(form: type[Rational]) -> None:
    layer = form(groups=2, init="identity")
    x = torch.randn(7, 6)
    out = layer(x)
    torch.testing.assert_close(out, x)
    out.square().sum().backward()
    denominator = layer.get_parameter("denominator" if form is GroupRational else "weight_denominator")
    assert denominator.grad is not None
    assert denominator.grad.abs().min() > 0


@pytest.mark.parametrize(("name", "published"), [("identity", 1.0), ("gelu", 2.3568), ("silu", 2.8178)])
def test_gains_are_the_published_ones(name: str, published: float) -> None:
    assert gain(name) == pytest.approx(published, rel=5e-3)  # theirs of the activation, ours of the fit


def test_fits_of_other_degrees() -> None:
    numerator, denominator = fit_rational("gelu", 3, 2)
    assert (len(numerator), len(denominator)) == (4, 2)


def test_only_x_and_the_coefficients_are_kept() -> None:
    layer = GroupRational(groups=2)
    x = torch.randn(50, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sum(kept) == x.numel() + layer.numerator.numel() + layer.denominator.numel()


def test_half_precision_is_computed_in_float32() -> None:
    x = torch.randn(40, 8, dtype=torch.bfloat16, requires_grad=True)
    layer = GroupRational(groups=2)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, layer(x.float()).bfloat16())
    out.float().sum().backward()
    assert layer.numerator.grad is not None
    assert layer.numerator.grad.dtype == torch.float32


def test_export_traces_the_plain_formula() -> None:
    layer = nn.Sequential(GroupRational(groups=2)).eval()
    x = torch.randn(5, 8)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="groups must divide"):
        group_rational(torch.randn(2, 7), torch.randn(2, 6), torch.randn(1, 4))
    with pytest.raises(ValueError, match="groups must divide"):
        group_rational(torch.randn(2, 12), torch.randn(2, 6), torch.randn(3, 4))
    with pytest.raises(ValueError, match="tanh"):
        GroupRational(init="tanh")
