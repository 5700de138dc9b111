"""Every variant and control of the operator against its formula, written out on given scores in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from karat import KArAtConfig, KArAtOperator, simplex_projection
from karat.models.distill.closed_form import Rows, fit_operator
from karat.operator import controls
from karat.operator.power import moments_with_places
from support.operators import Attend, error, layer_sum, make_mask, qkv

B, H, N, D = 2, 2, 6, 5
BASES = ("fourier(grid=2)", "bspline(grid=3,order=2)", "dog", "rational")
FORMS = ("rank=None", "rank=3", "rank=3,order=PhiW", "rank=3,order=PhiPhi")
SHAPED = [f"{basis}-b,rank=3,position=query" for basis in BASES]
POINTWISE = [
    f"{basis}-b,rank=None,order=Pointwise" for basis in (*BASES, "silu+fourier(grid=1)", "shannon(window=key)")
]
STATIC = ["static-b,rank=3", "static-b,rank=None", "row-b,rank=None"]
PLACED = "g2b,rank=3,order=Pointwise,position=query"
KINDS = ["g2b,rank=3,position=query", "g2b,rank=None,order=Pointwise", PLACED, *STATIC]
COMBINED = [
    *(f"{kind},residual=softmax{gate}" for kind in KINDS for gate in ("", ",gate=0.7")),
    *(f"{kind},simplex=row" for kind in KINDS),
    "g2b,rank=3,position=query,simplex=rank",
    "g2b,rank=None,order=Pointwise,base=gelu,edge_scales=True",
    f"{PLACED},base=gelu,edge_scales=True",
]
VARIANTS = [*SHAPED, *POINTWISE, PLACED, *STATIC, *COMBINED]


def outspoken(op: KArAtOperator) -> KArAtOperator:
    """Gates and places start at zero: here they speak."""
    for parameter in (op.gate, op.C):
        if parameter is not None:
            nn.init.normal_(parameter)
    return op


def written_out(op: KArAtOperator, scores: Tensor, mask: Tensor | None) -> Tensor:
    config, W, C = op.config, op.projector, op.places
    allowed = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
    softmax = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0)
    x = torch.where(allowed, scores, 0)
    if config.is_static:
        C = torch.ones(x.shape[1], x.shape[2], 1, dtype=x.dtype) if C is None else C  # a row for all queries
        sigma = (C if W is None else torch.einsum("hkp,hnp->hkn", C, W)).expand_as(x)
    elif config.order == "Pointwise":
        sigma = torch.stack([op.edges(x[:, h])[..., h, 0, 0] for h in range(x.shape[1])], dim=1)
        sigma = sigma if C is None else sigma + torch.einsum("hkp,hnp->hkn", C, W)
    elif config.rank is None:
        sigma = layer_sum(op, x, 0, allowed)
    elif config.order == "PhiW":
        sigma = layer_sum(op, torch.einsum("hrn,bhkn->bhkr", W, x), 0)
    elif config.order == "PhiPhi":
        sigma = layer_sum(op, layer_sum(op, x, 0, allowed), 1)
    else:
        hidden = layer_sum(op, x, 0, allowed)
        hidden = hidden if C is None else hidden + C
        hidden = simplex_projection(hidden) if config.simplex == "rank" else hidden
        sigma = torch.einsum("hnp,bhkp->bhkn", W, hidden)
    sigma = simplex_projection(sigma, allowed) if config.simplex == "row" else sigma
    sigma = torch.where(allowed, sigma, 0)
    if config.residual:
        gate = config.gate if op.gate is None else op.gate[:, None, None]
        sigma = softmax + gate * sigma
    return sigma


@pytest.mark.parametrize("spec", VARIANTS)
def test_both_faces_equal_the_formula(spec: str) -> None:
    op = outspoken(KArAtOperator(H, N, spec).double())
    q, k, v = qkv()
    bias = torch.randn(1, H, N, N, dtype=torch.float64)
    scores = q @ k.transpose(-2, -1) * D**-0.5 + bias
    for kind in ("none", "keys", "pairs"):
        mask = make_mask(kind)
        wanted, sigma = written_out(op, scores, mask), op(scores, mask)
        assert error(sigma, wanted) < 1e-9
        if mask is not None:
            assert (sigma[~mask.expand_as(sigma)] == 0).all()
        assert error(op.attend(q, k, v, bias=bias, mask=mask), wanted @ v) < 1e-9


@pytest.mark.parametrize("spec", VARIANTS)
def test_rows_that_see_nothing_give_nothing(spec: str) -> None:
    op = outspoken(KArAtOperator(H, N, spec).double())
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[2] = False
    out = op.attend(q, k, v, mask=mask)
    assert (out[:, :, 2] == 0).all()
    inputs = [q, k, v, *op.parameters()]
    for gradient in torch.autograd.grad(out.square().sum(), inputs, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("spec", [*SHAPED, *POINTWISE, PLACED, *STATIC, *COMBINED[:3]])
def test_gradcheck(spec: str) -> None:
    op = outspoken(KArAtOperator(1, 3, spec).double())
    names, parameters = zip(*op.named_parameters(), strict=True)
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip((f"op.{name}" for name in names), values, strict=True))
        return torch.func.functional_call(Attend(op), state, (q, k, v))

    assert torch.autograd.gradcheck(attend, (q, k, v, *parameters), eps=1e-6, atol=1e-4, fast_mode=True)


# --- one setting after the other


@pytest.mark.parametrize("kind", ["none", "keys"])
@pytest.mark.parametrize("basis", ["fourier(grid=2)", "silu+bspline(grid=3,order=2)"])
@pytest.mark.parametrize(("rank", "more"), [(None, ""), (3, ",position=query"), (None, ",residual=softmax,gate=0.5")])
def test_a_pointwise_operator_streams_many_keys(
    rank: int | None, more: str, basis: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = KArAtOperator(H, N, f"{basis}-b,rank={rank},order=Pointwise{more}").double()
    q, k, v = qkv()
    mask = make_mask(kind)
    formed = op.attend(q, k, v, mask=mask)
    monkeypatch.setattr(controls, "STREAMED_FROM", 1)
    monkeypatch.setattr(controls.Pointwise, "form", None)
    assert error(op.attend(q, k, v, mask=mask), formed) < 1e-9


def test_a_pointwise_identity_is_linear_attention() -> None:
    op = KArAtOperator(H, N, "g2b,rank=None,order=Pointwise,base=identity").double()
    nn.init.zeros_(op.layers[0].coefficients)
    q, k, v = qkv()
    torch.testing.assert_close(op.attend(q, k, v), q @ (k.transpose(-2, -1) @ v) * D**-0.5)


def test_a_pointwise_operator_knows_no_position() -> None:
    op = KArAtOperator(H, N, "g3b,rank=None,order=Pointwise").double()
    assert sum(parameter.numel() for parameter in op.parameters()) == H * 6
    scores, order = torch.randn(B, H, N, N, dtype=torch.float64), torch.randperm(N)
    torch.testing.assert_close(op(scores[..., order]), op(scores)[..., order])


@pytest.mark.parametrize("base", ["zero", "silu"])
def test_places_beside_a_pointwise_operator_begin_as_strong_as_it(base: str) -> None:
    op = KArAtOperator(H, N, f"{PLACED},base={base}").double()
    static = KArAtOperator(H, N, "static-b,rank=3").double()
    static.load_state_dict({name: x for name, x in op.state_dict().items() if name[0] in "WC"})
    scores = torch.randn(4096, H, N, N, dtype=torch.float64)
    places = static(scores[:1])
    power = torch.stack([(op(scores) - places).square().sum(-1).mean((0, 2)), places.square().sum(-1).mean((0, 2))])
    torch.testing.assert_close(power[0], power[1], rtol=0.1, atol=0)


@pytest.mark.parametrize("init", ["default", "paper"])
def test_places_of_a_pointwise_operator_that_starts_at_zero_learn(init: str) -> None:
    op = KArAtOperator(H, N, f"{PLACED},residual=softmax,gate=1,init_scale=0,init={init}")
    op.attend(*qkv(torch.float32)).square().sum().backward()
    assert op.W is not None
    assert op.W.grad is not None
    assert op.W.grad.norm() > 0


@pytest.mark.parametrize("spec", STATIC)
def test_static_mixing_never_looks_at_the_scores(spec: str) -> None:
    op = KArAtOperator(H, N, spec).double()
    q, k, v = (x.requires_grad_() for x in qkv())
    out = op.attend(q, k, v)
    assert torch.autograd.grad(out.sum(), (q, k), allow_unused=True) == (None, None)
    torch.testing.assert_close(op.attend(q * math.nan, k * math.nan, v), out)
    with pytest.raises(ValueError, match="blind to the scores: it has no edge functions"):
        op.edges(torch.zeros(()))


def test_a_row_serves_any_number_of_queries_alike() -> None:
    op = KArAtOperator(H, N, "row-b,rank=None").double()
    assert sum(parameter.numel() for parameter in op.parameters()) == H * N
    q, k, v = qkv()
    out = op.attend(q[:, :, :2], k, v)
    torch.testing.assert_close(out, torch.einsum("hn,bhnd->bhd", op.projector[..., 0], v).unsqueeze(2).expand_as(out))


def test_static_mixing_is_what_is_left_without_edges() -> None:
    operator = outspoken(KArAtOperator(H, N, "g2b,rank=3,position=query"))
    nn.init.zeros_(operator.layers[0].coefficients)
    static = KArAtOperator(H, N, "static-b,rank=3")
    static.load_state_dict({name: value for name, value in operator.state_dict().items() if name[0] in "WC"})
    q, k, v = qkv(torch.float32)
    torch.testing.assert_close(operator.attend(q, k, v), static.attend(q, k, v))


def test_the_query_s_place_starts_as_absent_in_the_paper_s_draws() -> None:
    placed = KArAtOperator(H, N, "g2b,rank=3,position=query,init=paper")
    plain = KArAtOperator(H, N, "g2b,rank=3")
    plain.load_state_dict({name: value for name, value in placed.state_dict().items() if name[0] != "C"})
    scores = torch.randn(B, H, N, N)
    assert torch.equal(plain(scores), placed(scores))


def test_a_term_of_the_query_s_place_starts_as_strong_as_the_sums() -> None:
    op = KArAtOperator(8, 65, "g3b,position=query")
    assert op.places is not None
    assert op.places.square().mean().item() == pytest.approx(1, abs=0.05)
    both = op(torch.randn(8, 8, 65, 65)).square().sum(-1).mean()
    nn.init.zeros_(op.C)
    sums = op(torch.randn(8, 8, 65, 65)).square().sum(-1).mean()
    assert (sums / both).item() == pytest.approx(0.5, abs=0.1)


def test_moments_with_places_are_those_over_all_queries() -> None:
    op = KArAtOperator(2, 3, "g2b,rank=2,position=query")
    assert op.places is not None
    x = torch.randn(1000, 2, 2, dtype=torch.float64) + 1
    y = (x.unsqueeze(2) + op.places.detach().double()).transpose(0, 1).flatten(1, 2)  # of all queries
    mean, power = moments_with_places(x.mean(0), torch.einsum("shr,sht->hrt", x, x) / len(x), op.places)
    torch.testing.assert_close(mean, y.mean(1))
    torch.testing.assert_close(power, y.mT @ y / y.shape[1])


def test_a_converted_operator_has_no_term_of_the_query_s_place() -> None:
    op = KArAtOperator(H, N, "g2b,rank=3,position=query")
    scores = torch.randn(B, H, N, N)
    fit_operator(op, lambda: iter([Rows(scores, scores.softmax(-1), torch.randn(B, H, N, 4))]))
    assert op.C is not None
    assert (op.C == 0).all()


@pytest.mark.parametrize("spec", [*STATIC, "g2b,rank=None,order=Pointwise", PLACED])
def test_what_has_no_edge_functions_of_its_keys_is_not_fitted(spec: str) -> None:
    op = outspoken(KArAtOperator(H, N, f"{spec},residual=softmax"))
    before = {name: value.clone() for name, value in op.state_dict().items()}
    scores = torch.randn(B, H, N, N)
    with pytest.raises(ValueError, match=r"no edge functions to fit|that all keys share can't be fitted"):
        fit_operator(op, lambda: iter([Rows(scores, scores.softmax(-1), torch.randn(B, H, N, 4))]))
    assert all(torch.equal(value, before[name]) for name, value in op.state_dict().items())


@pytest.mark.parametrize("spec", ["g2b,position=query", PLACED, *STATIC[:2]])
def test_places_of_queries_ask_for_all_of_them(spec: str) -> None:
    op = KArAtOperator(H, N, spec)
    q, k, v = qkv(torch.float32)
    with pytest.raises(ValueError, match=r"place of each query among 6 tokens and got 3 queries: .*self-attention"):
        op.attend(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="got 3 queries"):
        op(torch.zeros(B, H, 3, N))


@pytest.mark.parametrize(("gate", "shape"), [("head", (2,)), ("1.0,init_scale=0.0", None)])
@pytest.mark.parametrize(
    "kind", ["g3b", "g2b,rank=None,order=Pointwise", PLACED, "static-b", "static-b,rank=None", "row-b,rank=None"]
)
def test_gates_that_begin_as_softmax(kind: str, gate: str, shape: tuple[int] | None) -> None:
    op = KArAtOperator(3, N, f"{kind},residual=softmax,gate={gate},softmax_heads=1")
    assert (None if op.gate is None else tuple(op.gate.shape)) == shape
    q, k, v = torch.randn(3, B, 3, N, D).unbind()
    wanted = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(op.attend(q, k, v), wanted, atol=1e-6, rtol=1e-5)
    op.attend(q, k, v).square().sum().backward()  # the start at zero can be left again
    assert max(float(p.grad.abs().max()) for p in op.parameters() if p.grad is not None) > 0


ALL_FORMS = [*(f"g2b,{form}" for form in FORMS), "dog-b,rank=None", "g2b,rank=None,order=Pointwise", PLACED, *STATIC]
ALL_FORMS += ["g2b,rank=3,simplex=rank", "g2b,rank=3,order=PhiPhi,base=silu,edge_scales=True", "g2b,rank=3,init=paper"]


@pytest.mark.parametrize("spec", ALL_FORMS)
def test_the_initial_scale_multiplies_sigma(spec: str) -> None:
    scores = torch.randn(B, H, N, N)
    found = []
    for scale in (1.0, 0.25, 0.0):
        torch.manual_seed(2)
        found.append(KArAtOperator(H, N, f"{spec},init_scale={scale}")(scores))
    torch.testing.assert_close(found[1], 0.25 * found[0])
    assert (found[2] == 0).all()


STARTS = [
    *(f"{basis}-b,rank=None,order=Pointwise" for basis in ("fourier(grid=3)", "morlet", "rational")),
    "silu+dog-b,rank=None,order=Pointwise,edge_scales=True",
    "g3b,order=Pointwise,position=query",
    "dog-b,order=Pointwise,position=query",
    "g3b,position=query",
    "g3b,position=query,simplex=rank",
    "static-b",
    "static-b,rank=None",
    "row-b,rank=None",
]


@pytest.mark.parametrize("spec", STARTS)
def test_the_output_starts_as_large_as_a_mean_of_the_values(spec: str) -> None:
    op = KArAtOperator(8, 65, spec)
    with torch.no_grad():
        power = op(torch.randn(8, 8, 65, 65)).square().sum(-1).mean().item()
    assert 65 * power == pytest.approx(1, abs=0.2)


def test_dropout_of_static_mixing_differs_from_image_to_image() -> None:
    op = KArAtOperator(H, N, "static-b,rank=3")
    v = torch.eye(N).expand(B, H, N, N)
    dropped = op.attend(*qkv(torch.float32)[:2], v, dropout_p=0.5)
    kept = dropped != 0
    assert not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(dropped[kept], 2 * op.attend(*qkv(torch.float32)[:2], v)[kept])


def test_the_configuration_of_an_operator_is_one_of_its_own() -> None:
    assert KArAtOperator(H, N, "recommended").config == KArAtConfig.parse("static-b,residual=softmax")
