"""The default start: O = σ(A)V as large as softmax's mean of V, or as V beside softmax; the paper's draws."""

from __future__ import annotations

import pytest
import torch

from karat import KArAtConfig, KArAtOperator
from karat.basis import BASES

SPECS = [*BASES, "fourier(grid=1)", "fourier(grid=11)", "bspline(grid=5,order=2,range=1)"]
FORMS = [(None, "WPhi"), *((rank, order) for rank in (2, 12, 40) for order in ("WPhi", "PhiW", "PhiPhi"))]


@pytest.mark.parametrize("tokens", [9, 65])
@pytest.mark.parametrize(("rank", "order"), FORMS)
@pytest.mark.parametrize("basis", SPECS)
def test_output_starts_as_large_as_a_mean_of_the_values(basis: str, rank: int | None, order: str, tokens: int) -> None:
    op = KArAtOperator(8, tokens, KArAtConfig(basis=basis, rank=rank, order=order))
    with torch.no_grad():
        sigma = op(torch.randn(8, 8, 48, tokens))
        out = sigma @ torch.randn(8, 8, tokens, 16)
    assert out.var().item() * tokens == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("order", ["WPhi", "PhiW", "PhiPhi"])
def test_beside_softmax_the_operator_starts_as_large_as_the_values(order: str) -> None:
    op = KArAtOperator(8, 65, f"g3b,order={order},residual=softmax,gate=1.0")
    alone = KArAtOperator(8, 65, f"g3b,order={order}")
    scores = torch.randn(4, 8, 64, 65)
    with torch.no_grad():
        learned = op(scores) - scores.softmax(-1)
        assert learned.square().sum(-1).mean().item() == pytest.approx(1, abs=0.2)
        assert alone(scores).square().sum(-1).mean().item() * 65 == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("tokens", [197, 785])
def test_at_the_sizes_of_vision_transformers(tokens: int) -> None:
    for config in ("g1b", "g3b", "g3b,rank=2", "g3b,order=PhiW", "g3b,order=PhiPhi", "bspline-b"):
        op = KArAtOperator(3, tokens, config)
        q, k, v = torch.randn(3, 2, 3, tokens, 64).unbind()
        with torch.no_grad():
            assert op.attend(q, k, v).var().item() * tokens == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("settings", [{"edge_scales": True}, {"edge_scales": True, "base": "silu"}, {"base": "gelu"}])
def test_with_scales_and_base(settings: dict) -> None:
    for order in ("WPhi", "PhiW", "PhiPhi") if settings.get("edge_scales") else ("WPhi",):
        op = KArAtOperator(8, 65, KArAtConfig(order=order, **settings))
        with torch.no_grad():
            power = op(torch.randn(4, 8, 64, 65)).square().sum(-1).mean().item() * 65
        assert power == pytest.approx(1, abs=0.2)


def test_simplex_before_w() -> None:
    op = KArAtOperator(8, 65, "g3b,simplex=rank")
    with torch.no_grad():
        assert op(torch.randn(4, 8, 64, 65)).square().sum(-1).mean().item() * 65 == pytest.approx(1, abs=0.2)


def test_paper_draws() -> None:
    op = KArAtOperator(8, 197, "g3b,init=paper")
    assert op.layers[0].coefficients.std().item() == pytest.approx(1, abs=0.02)
    wavelet = KArAtOperator(8, 197, "morlet-b,init=paper").layers[0]
    assert wavelet.weight.std().item() == pytest.approx(1, abs=0.03)
    assert (wavelet.translation == 0).all()
    assert (wavelet.dilation == 1).all()
    rational = KArAtOperator(8, 197, "rational-b,init=paper").layers[0]
    assert rational.numerator.std().item() == pytest.approx(1, abs=0.02)
    assert rational.denominator.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("m", "n"), [(5, 4), (3, 2), (2, 1)])
def test_no_rational_function_starts_with_a_pole_far_out(m: int, n: int) -> None:
    layer = KArAtOperator(8, 197, f"rational(m={m},n={n})-b").layers[0]
    b = layer.packed().flatten(2).transpose(0, 1)[m + 1 :]
    assert (b > 0).all()  # the highest one bounds φ
    assert b.mean().item() == pytest.approx(0.05, rel=0.05)
    assert layer.denominator.mean().item() == pytest.approx(1, rel=0.05)  # learns in proportion to its size


def test_same_seed_same_operator() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(KArAtOperator(2, 17, "g3b").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["g3b", "g3b,order=PhiW", "static-b", "g3b,simplex=rank"])
def test_half_precision_starts_as_its_rounding(spec: str, dtype: torch.dtype) -> None:
    """QR, by which W is drawn, is there in float32 and float64 alone."""
    op = KArAtOperator(2, 9, spec).to(dtype)
    op.reset_parameters()
    scores, v = torch.randn(64, 2, 9, 9), torch.randn(64, 2, 9, 16)
    with torch.no_grad():
        out = op(scores.to(dtype)).float() @ v
    assert out.var().item() * 9 == pytest.approx(1, abs=0.4)


def test_meta_device_draws_nothing() -> None:
    with torch.device("meta"):
        op = KArAtOperator(3, 197, "g3b,rank=None")
    assert all(parameter.is_meta for parameter in op.parameters())
