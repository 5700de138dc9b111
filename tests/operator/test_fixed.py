"""Fixed functions in softmax's place: each against its formula, and what all of them promise, over the registry."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

import karat
from karat import KArAtConfig, KArAtOperator
from karat.models.resample import resample_tokens
from karat.operator.fixed import FIXED
from support.small_models import images, small_model

H, N, D = 2, 6, 4


def rising(power: float, half: float) -> Callable[[list[float]], list[float]]:
    """[half·a − τ]₊^power with the τ that makes the sum one, found by bisection."""

    def row(a: list[float]) -> list[float]:
        def weights(tau: float) -> list[float]:
            return [max(half * x - tau, 0) ** power for x in a]

        top = half * max(a)
        tau = brentq(lambda tau: sum(weights(tau)) - 1, top - 2, top, xtol=1e-14)
        return weights(tau)

    return row


def softmax(a: list[float]) -> list[float]:
    total = sum(map(math.exp, a))
    return [math.exp(x) / total for x in a]


FUNCTIONS = [name for name, function in FIXED.items() if function.sees_scores]

# A row of scores of the keys that a query may see -> its attention, entry by entry.
FORMULAS: dict[str, Callable[[list[float]], list[float]]] = {
    "sigmoid": lambda a: [1 / (1 + math.exp(-(x - math.log(len(a))))) for x in a],
    "relu": lambda a: [max(x, 0) / len(a) for x in a],
    "entmax15": rising(2, 0.5),
    "sparsemax": rising(1, 1),
    "lsa": lambda a: softmax([1.5 * x for x in a]),  # the sharpness of the operators below
}


def operator(name: str) -> KArAtOperator:
    op = KArAtOperator(H, N, name).double()
    if op.sharpness is not None:
        torch.nn.init.constant_(op.sharpness, 1.5)
    return op


def qkv() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return (2 * torch.randn(3, 2, H, N, D, dtype=torch.float64)).unbind()


def masks() -> dict[str, Tensor | None]:
    keys = torch.tensor([True, False, True, True, False, True])
    pairs = torch.rand(2, 1, N, N) > 0.4
    pairs[0, 0, 1] = False  # a query that may see nothing
    return {"none": None, "keys": keys.expand(1, 1, 1, N), "pairs": pairs}


def test_every_function_has_a_formula_here() -> None:
    assert [*FORMULAS] == FUNCTIONS
    assert all(function.formula and function.paper for function in FIXED.values())


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("name", FUNCTIONS)
def test_attention_is_its_formula_over_the_keys_that_are_seen(name: str, mask: str) -> None:
    op, (q, k, v), seen = operator(name), qkv(), masks()[mask]
    scores = q @ k.transpose(-2, -1) * D**-0.5
    allowed = torch.ones_like(scores, dtype=torch.bool) if seen is None else seen.expand_as(scores).clone()
    if name == "lsa":
        allowed &= ~torch.eye(N, dtype=torch.bool)
    expected = torch.zeros_like(scores)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(H), torch.arange(N)).tolist():
        row = tuple(place)
        if allowed[row].any():
            expected[row][allowed[row]] = torch.tensor(
                FORMULAS[name](scores[row][allowed[row]].tolist()), dtype=torch.float64
            )
    torch.testing.assert_close(op(scores, seen), expected)
    torch.testing.assert_close(op.attend(q, k, v, mask=seen), op(scores, seen) @ v)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name: str) -> None:
    op, (q, k, v) = operator(name), (x[:1].requires_grad_() for x in qkv())
    mask = torch.rand(1, 1, N, N) > 0.3
    assert torch.autograd.gradcheck(lambda *x: op.attend(*x, mask=mask), (q, k, v))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision_stays_near(name: str) -> None:
    op, (q, k, v) = operator(name), qkv()
    low = op.bfloat16().attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), operator(name).attend(q, k, v), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("more", ["", ",blocks=(0,)", ",softmax_heads=(1,)", ",position_bias=relative"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_names_go_both_ways_into_models(name: str, more: str) -> None:
    config = KArAtConfig.parse(name + more)
    assert str(config) == name + more
    assert KArAtConfig.parse(str(config)) == config
    model, x = small_model("vit", name + more).eval(), images("vit")
    logits = model(x)
    with karat.record(model) as found:
        torch.testing.assert_close(model(x), logits)
    seen = found["blocks.0.attn"]
    torch.testing.assert_close(
        seen.attention[:, :1], KArAtOperator(3, 17, name)(seen.scores)[:, :1]
    )  # a head that isn't softmax's
    own = {key for key in model.state_dict() if "operator" in key}
    assert len(own) == sum("sharpness" in key for key in own) == (name == "lsa") * (1 if "blocks" in more else 2)
    other = small_model("vit", name + more)
    other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_serve_every_backbone_and_grid(name: str) -> None:
    for backbone in ("convit", "swin"):
        assert small_model(backbone, name)(images(backbone)).isfinite().all()
    model = small_model("vit", name).eval()
    resample_tokens(model, img_size=24)
    assert model(torch.randn(1, 3, 24, 24)).isfinite().all()
    with torch.device("meta"):
        assert KArAtOperator(2, 5, name)


@pytest.mark.parametrize("option", ["rank=3", "order=PhiW", "base=silu", "simplex=row", "residual=softmax", "gate=1"])
@pytest.mark.parametrize("name", FIXED)
def test_settings_of_operators_are_refused(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option.partition('=')[0]}=.* doesn't go with {name}, a fixed function"):
        KArAtConfig.parse(f"{name},{option}")


@pytest.mark.parametrize("name", ["entmax15", "sparsemax"])
def test_a_missing_entmax_is_said_in_a_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "entmax", None)
    with pytest.raises(ValueError, match=rf"attention={name} needs the package entmax: pip install 'karat\[entmax\]'"):
        KArAtConfig.parse(name)
    assert KArAtConfig.parse("sigmoid").is_fixed


def test_what_they_lack_is_told() -> None:
    with pytest.raises(ValueError, match="sigmoid is fixed: it has no edge functions"):
        KArAtOperator(2, 5, "sigmoid").edges(torch.zeros(1))
    with pytest.raises(ValueError, match="relu attention has no basis"):
        _ = KArAtConfig.parse("relu").edge_basis
    with pytest.raises(ValueError, match="hides each query's own key, and there are 3 queries for 5 keys"):
        KArAtOperator(2, 5, "lsa")(torch.zeros(1, 2, 3, 5))
