"""The operator against the double sum of SPEC §1, written out from `op.edges` and `op.projector`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from karat import KArAtConfig, KArAtOperator, simplex_projection
from karat.basis import BASES
from karat.ops.masks import row_patterns
from support.operators import Attend, B, D, H, N, error, layer_sum, make_mask, qkv

FORMS = [(None, "WPhi"), *((rank, order) for rank in (5, 2) for order in ("WPhi", "PhiW", "PhiPhi"))]
MASKS = ["none", "keys", "pairs"]


def written_out(op: KArAtOperator, scores: Tensor, mask: Tensor | None) -> Tensor:
    """σ by SPEC §1, in float64."""
    config, W = op.config, op.projector
    mask = None if mask is None else mask.expand(scores.shape)
    zeroed = scores if mask is None else torch.where(mask, scores, 0)
    if config.rank is None:
        sigma = layer_sum(op, zeroed, 0, mask)
    elif config.order == "WPhi":
        hidden = layer_sum(op, zeroed, 0, mask)
        hidden = simplex_projection(hidden) if config.simplex == "rank" else hidden
        sigma = torch.einsum("hnp,bhkp->bhkn", W, hidden)
    elif config.order == "PhiW":
        sigma = layer_sum(op, torch.einsum("hrn,bhkn->bhkr", W, zeroed), 0)
    else:
        sigma = layer_sum(op, layer_sum(op, zeroed, 0, mask), 1)
    if config.simplex == "row":
        sigma = simplex_projection(sigma, mask)
    sigma = sigma if mask is None else torch.where(mask, sigma, 0)
    if config.residual:
        lowered = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        sigma = lowered.softmax(-1).nan_to_num(0) + op.gate[:, None, None] * sigma
    return sigma


def check_both_faces(config: KArAtConfig, mask_kind: str) -> None:
    op = KArAtOperator(H, N, config).double()
    if op.gate is not None:
        torch.nn.init.normal_(op.gate)
    q, k, v = qkv()
    bias = torch.randn(1, H, N, N, dtype=torch.float64)
    mask = make_mask(mask_kind)
    scores = q @ k.transpose(-2, -1) * D**-0.5 + bias
    wanted = written_out(op, scores, mask)
    sigma = op(scores, mask)
    assert error(sigma, wanted) < 1e-9
    if mask is not None:
        assert (sigma[~mask.expand_as(sigma)] == 0).all()
    assert error(op.attend(q, k, v, bias=bias, mask=mask), wanted @ v) < 1e-9


@pytest.mark.parametrize("base", ["zero", "silu"])
@pytest.mark.parametrize(("rank", "order"), FORMS)
@pytest.mark.parametrize("basis", BASES)
def test_equals_the_double_sum(basis: str, rank: int | None, order: str, base: str) -> None:
    for mask_kind in MASKS:
        check_both_faces(KArAtConfig(basis=basis, rank=rank, order=order, base=base), mask_kind)


@pytest.mark.parametrize("edge_scales", [True, "published"])
@pytest.mark.parametrize(("rank", "order"), FORMS)
@pytest.mark.parametrize("basis", ["fourier(grid=2)", "rational", "shannon(window=key)"])
def test_with_edge_scales(basis: str, rank: int | None, order: str, edge_scales: bool | str) -> None:
    for base in ("zero", "gelu", "identity"):
        config = KArAtConfig(basis=basis, rank=rank, order=order, base=base, edge_scales=edge_scales)
        check_both_faces(config, "pairs")


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("settings", [{"simplex": "row"}, {"simplex": "rank"}, {"residual": "softmax"}])
@pytest.mark.parametrize(("rank", "order"), FORMS)
@pytest.mark.parametrize("basis", ["fourier(grid=2)", "dog"])
def test_simplex_and_residual(basis: str, rank: int | None, order: str, settings: dict, mask_kind: str) -> None:
    if settings.get("simplex") == "rank" and (rank is None or order != "WPhi"):
        with pytest.raises(ValueError, match="'rank'"):
            KArAtConfig(basis=basis, rank=rank, order=order, **settings)
        return
    check_both_faces(KArAtConfig(basis=basis, rank=rank, order=order, **settings), mask_kind)


@pytest.mark.parametrize(("rank", "order"), FORMS)
@pytest.mark.parametrize("basis", BASES)
def test_attend_in_float32_at_the_default_initialisation(basis: str, rank: int | None, order: str) -> None:
    op = KArAtOperator(H, 40, KArAtConfig(basis=basis, rank=rank, order=order))
    q, k, v = torch.randn(3, B, H, 40, 16).unbind()
    wanted = op.double()(q.double() @ k.double().transpose(-2, -1) / 4) @ v.double()
    assert error(op.float().attend(q, k, v).double(), wanted) < 1e-4


@pytest.mark.parametrize(("rank", "order"), FORMS)
@pytest.mark.parametrize("basis", ["fourier(grid=2)", "bspline(grid=3,order=2)", "morlet", "rational"])
def test_gradcheck(basis: str, rank: int | None, order: str) -> None:
    op = KArAtOperator(1, 3, KArAtConfig(basis=basis, rank=rank, order=order, base="silu", edge_scales=True)).double()
    names, parameters = zip(*op.named_parameters(), strict=True)
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(
            Attend(op), dict(zip((f"op.{name}" for name in names), values, strict=True)), (q, k, v)
        )

    assert torch.autograd.gradcheck(attend, (q, k, v, *parameters), eps=1e-6, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("config", ["g2b,rank=5", "g2b,order=PhiW", "g2b,order=PhiPhi", "dog-b,residual=softmax"])
def test_windows_of_few_kinds_need_no_sigma(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 144  # above the count where it pays
    op = KArAtOperator(H, n, config).double()
    region = torch.randint(0, 4, (B, 1, n))
    mask = region.unsqueeze(-1) == region.unsqueeze(-2)
    patterns = row_patterns(mask)
    assert patterns is not None
    assert len(patterns) <= 4
    assert torch.stack([member for member, _ in patterns]).sum(0).eq(1).all()
    q, k, v = torch.randn(3, B, H, n, D, dtype=torch.float64).unbind()
    wanted = op(q @ k.transpose(-2, -1) * D**-0.5, mask) @ v
    finish = op.order.finish

    def without_sigma(self: object, parameters: KArAtOperator, sums: Tensor, v: Tensor | None) -> Tensor:
        assert v is not None
        return finish(parameters, sums, v)

    monkeypatch.setattr(type(op.order), "finish", without_sigma)
    assert error(op.attend(q, k, v, mask=mask), wanted) < 1e-9
    assert row_patterns(torch.rand(1, 1, n, n) > 0.5) is None


def test_rows_that_see_nothing_are_zero_and_their_gradients_finite() -> None:
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[2] = False
    for config in ("g2b", "g2b,residual=softmax", "g2b,simplex=row", "g2b,softmax_heads=1", "g2b,order=PhiW"):
        op = KArAtOperator(H, N, config)
        q, k, v = (x.requires_grad_() for x in qkv(torch.float32))
        out = op.attend(q, k, v, mask=mask)
        assert (out[:, :, 2] == 0).all()
        for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
            assert gradient.isfinite().all()


def test_residual_begins_as_softmax() -> None:
    op = KArAtOperator(H, N, "g3b,residual=softmax")
    q, k, v = qkv(torch.float32)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(op.attend(q, k, v), wanted)
    assert op.gate.shape == (H,)


@pytest.mark.parametrize("settings", ["rank=5", "rank=None", "order=PhiPhi", "simplex=rank", "softmax_heads=(1,)"])
def test_residual_computes_the_scores_once(settings: str) -> None:
    """Beside the operator's own products there is one more, that of the probabilities with v."""
    heads, n = 3, 40
    q, k, v = (x.requires_grad_() for x in torch.randn(3, B, heads, n, D).unbind())
    flops = []
    for residual in ("", ",residual=softmax"):
        op = KArAtOperator(heads, n, f"g2b,{settings}{residual}")
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter:
                out = op.attend(q, k, v)
                if backward:
                    out.sum().backward()
            flops.append(counter.get_total_flops())
    product = 2 * B * len(op.karat_heads) * n * n * D
    assert flops[2] - flops[0] == product
    assert flops[3] - flops[1] == 3 * product  # P v; dV and dP


@pytest.mark.parametrize("order", ["WPhi", "PhiW", "PhiPhi"])
@pytest.mark.parametrize("impl", ["reference", "tiled", "auto"])
def test_gates_and_scores_learn_alike_whatever_computes_them(order: str, impl: str) -> None:
    op = KArAtOperator(H, N, f"silu+fourier(grid=2)-b,rank=5,order={order},residual=softmax,impl={impl}")
    torch.nn.init.normal_(op.gate)
    q, k, v = (x.requires_grad_() for x in qkv(torch.float32))
    leaves = [q, k, v, *op.parameters()]
    wanted = op(q @ k.transpose(-2, -1) * D**-0.5) @ v
    got = op.attend(q, k, v)
    weights = torch.randn_like(got)
    for x, exact in zip(
        (got, *torch.autograd.grad(got, leaves, weights)),
        (wanted, *torch.autograd.grad(wanted, leaves, weights)),
        strict=True,
    ):
        torch.testing.assert_close(x, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", ["(0,)", "(1,)", "(2,)", "(0,2)", "(0,1)"])
@pytest.mark.parametrize("residual", ["", ",residual=softmax"])
def test_hybrid_heads_anywhere(which: str, residual: str) -> None:
    op = KArAtOperator(3, N, f"g2b,softmax_heads={which}{residual}").double()
    q, k, v = torch.randn(3, B, 3, N, D, dtype=torch.float64).unbind()
    bias, mask = torch.randn(1, 3, 1, N, dtype=torch.float64), make_mask("keys")
    out = op.attend(q, k, v, bias=bias, mask=mask)
    assert error(out, op(q @ k.transpose(-2, -1) * D**-0.5 + bias, mask) @ v) < 1e-9
    assert op.attend(q, k, v).transpose(1, 2).is_contiguous()  # the model's heads join without a copy


def test_hybrid_heads_keep_softmax_and_own_nothing() -> None:
    op = KArAtOperator(3, N, "g3b,softmax_heads=(1,)")
    assert op.karat_heads == (0, 2)
    assert op.W.shape == (2, N, 12)
    scores = torch.randn(B, 3, N, N)
    sigma = op(scores)
    torch.testing.assert_close(sigma[:, 1], scores[:, 1].softmax(-1))
    alone = KArAtOperator(2, N, "g3b")
    alone.load_state_dict(op.state_dict())
    torch.testing.assert_close(sigma[:, [0, 2]], alone(scores[:, [0, 2]]))
    q, k, v = torch.randn(3, B, 3, N, D).unbind()
    torch.testing.assert_close(op.attend(q, k, v), op(q @ k.transpose(-2, -1) * D**-0.5) @ v, atol=1e-5, rtol=1e-4)
    assert KArAtOperator(3, N, "g3b,softmax_heads=2").softmax_heads == (1, 2)


def test_dropout_drops_entries_of_sigma() -> None:
    op = KArAtOperator(H, N, "g2b").double()
    q, k, _ = qkv()
    v = torch.eye(N, dtype=torch.float64).expand(B, H, N, N)  # the output is σ itself
    sigma = op(q @ k.transpose(-2, -1) * D**-0.5)
    dropped = op.attend(q, k, v, dropout_p=0.5)
    kept = dropped != 0
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * sigma[kept])


def test_cross_attention_needs_nothing_more() -> None:
    for order in ("WPhi", "PhiW", "PhiPhi"):
        op = KArAtOperator(H, N, f"g2b,order={order}").double()
        q = torch.randn(B, H, 3, D, dtype=torch.float64)
        _, k, v = qkv()
        sigma = op(q @ k.transpose(-2, -1) * D**-0.5)
        assert sigma.shape == (B, H, 3, N)
        torch.testing.assert_close(op.attend(q, k, v), sigma @ v)


def test_bfloat16_scores() -> None:
    for basis in BASES:
        op = KArAtOperator(H, N, f"{basis}-b")
        scores = torch.tensor([1e4, -1e4, 300.0, 1.0, 0.0, -2.5]).expand(B, H, N, N).to(torch.bfloat16)
        sigma = op(scores)
        assert sigma.dtype == torch.bfloat16
        assert sigma.isfinite().all()


def test_edges_answer_in_the_precision_of_x() -> None:
    op = KArAtOperator(H, N, "g3b")
    assert op.edges(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64
    assert op.edges(torch.zeros(2, 3)).shape == (2, 3, H, 12, N)
    assert KArAtOperator(H, N, "g3b,order=PhiPhi").edges(torch.zeros(()), layer=1).shape == (H, N, 12)
    with pytest.raises(ValueError, match="layer must be 0 to 0"):
        op.edges(torch.zeros(()), layer=1)


@pytest.mark.parametrize(("rank", "order"), FORMS)
def test_shapes_of_the_parameters(rank: int | None, order: str) -> None:
    op = KArAtOperator(H, N, KArAtConfig(rank=rank, order=order))
    wanted = {"WPhi": (H, N, rank), "PhiW": (H, rank, N), "PhiPhi": None}[order] if rank else None
    assert (None if op.projector is None else tuple(op.projector.shape)) == wanted


def test_wrong_sizes_say_what_to_do() -> None:
    op = KArAtOperator(H, N, "g3b")
    with pytest.raises(ValueError, match=r"made for 6 tokens and got 7.*resample_tokens"):
        op(torch.zeros(1, H, 7, 7))
    with pytest.raises(ValueError, match="2 heads, the input 3"):
        op(torch.zeros(1, 3, N, N))
    with pytest.raises(ValueError, match="softmax_heads=2 leaves no head"):
        KArAtOperator(2, N, "g3b,softmax_heads=2")
    with pytest.raises(ValueError, match=r"softmax_heads=\(5,\)"):
        KArAtOperator(2, N, "g3b,softmax_heads=(5,)")
    with pytest.raises(ValueError, match="num_tokens must be >= 1"):
        KArAtOperator(2, 0, "g3b")
    with pytest.raises(ValueError, match=r"num_tokens must be >= 1, a whole number, got 4\.0"):
        KArAtOperator(2, 4.0, "g3b")
    with pytest.raises(ValueError, match="softmax attention has no basis"):
        KArAtOperator(2, 3, "softmax")


@pytest.mark.parametrize("spec", ["g2b,rank=2", "dog-b,rank=None", "g1b,rank=2,order=PhiW", "g1b,rank=2,order=PhiPhi"])
@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 1, N, dtype=torch.bool)], ids=["all", "keys"])
def test_no_queries_give_no_rows(spec: str, mask: Tensor | None) -> None:
    assert KArAtOperator(H, N, spec)(torch.zeros(2, H, 0, N), mask).shape == (2, H, 0, N)
