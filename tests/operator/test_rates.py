"""One step changes an operator as much as a linear layer, at any size; what was saved before stays what it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from karat import KArAtOperator, resample_operator
from karat.basis import BASES
from karat.operator.grids import on_grid
from karat.operator.operator import with_factors, without_torn_layers
from karat.operator.rates import RATE, moments, rounded
from karat.operator.token_grid import TokenGrid

LINEAR = 28e-3  # of a linear layer of width 192, by one Adam step of 1e-3 (docs/method.md)


def change(make: Callable[[], nn.Module], run: Callable[[nn.Module], Tensor], steps: int = 1) -> float:
    """‖ΔO‖/‖O‖ by Adam steps of 1e-3 towards a random target of O's size."""
    torch.manual_seed(0)
    module = make()
    before = run(module).detach()
    target = before + before.norm() / before.numel() ** 0.5 * torch.randn_like(before)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (run(module) - target).square().mean().backward()
        optimizer.step()
    return float((run(module).detach() - before).norm() / before.norm())


def attend_change(config: str, tokens: int, steps: int = 1) -> float:
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 2, 3, tokens, 32).unbind()
    return change(lambda: KArAtOperator(3, tokens, config), lambda op: op.attend(q, k, v), steps)


SPECS = [*BASES, "fourier(grid=1)", "fourier(grid=11)", "bspline(grid=5)", "silu+fourier(grid=3)"]


@pytest.mark.parametrize("tokens", [17, 197])
@pytest.mark.parametrize("basis", SPECS)
def test_one_step_is_a_linear_layers_for_every_basis(basis: str, tokens: int) -> None:
    assert 0.5 < attend_change(f"{basis}-b", tokens) / LINEAR < 2.5


@pytest.mark.parametrize("tokens", [17, 197])
@pytest.mark.parametrize("rank", [2, 48])
@pytest.mark.parametrize("order", ["WPhi", "PhiW", "PhiPhi"])
def test_one_step_is_a_linear_layers_for_every_order_and_rank(order: str, rank: int, tokens: int) -> None:
    assert 0.5 < attend_change(f"g3b,rank={rank},order={order}", tokens) / LINEAR < 2.5


@pytest.mark.parametrize(
    "config",
    [
        *("g3b,rank=None", "g6b,rank=None,order=Pointwise", "static-b", "row-b,rank=None", "static-b,rank=None"),
        *("g3b,position=query", "g3b,edge_scales=True", "g3b,base=silu,edge_scales=True", "g3b,simplex=rank"),
    ],
)
def test_one_step_is_a_linear_layers_for_variants_and_controls(config: str) -> None:
    assert 0.5 < attend_change(config, 65) / LINEAR < 2.5


def test_a_hundred_steps_stay_together() -> None:
    """At every number of tokens the same way is gone, where the factor of one went up to four times as far."""
    ways = [attend_change("g3b", tokens, steps=100) for tokens in (17, 65, 197)]
    assert max(ways) / min(ways) < 2


def test_a_weaker_start_has_the_same_relative_rate() -> None:
    assert attend_change("g1b,init_scale=0.1", 65) == pytest.approx(attend_change("g1b", 65), rel=0.2)


def test_the_papers_draws_have_factors_of_one() -> None:
    op = KArAtOperator(3, 65, "g3b,init=paper")
    assert op.W_factor == 1
    assert (op.layers[0].factor == 1).all()


def test_factors_are_exact_in_every_precision() -> None:
    for config in ("g3b", "rational-b", "g3b,rank=None", "static-b"):
        op = KArAtOperator(3, 65, config)
        for name, buffer in op.named_buffers():
            assert torch.equal(buffer.bfloat16().float(), buffer), name
    assert rounded(0.3) == pytest.approx(0.3, rel=2**-8)


def test_moments_against_closed_forms() -> None:
    """E cos x = e^(-1/2), E sin x = 0; E cos² + E sin² = 1; φ' of a sine is as large as φ."""
    fourier = moments(KArAtOperator(1, 5, "g1b").layers[0].basis)
    assert fourier.mean == pytest.approx(0.6065, abs=1e-3)
    assert fourier.power == pytest.approx(1, abs=1e-6)
    assert fourier.slope == pytest.approx(1, abs=0.15)  # over 64 draws
    assert RATE / 1e3 < LINEAR


def old(op: KArAtOperator) -> dict[str, Tensor]:
    """The state that the version without factors saved for the same function."""
    for layer in op.edge_layers:
        layer.set_factor(torch.ones_like(layer.factor))
    for name in op.factored():
        op.set_factor(name.removesuffix("_factor"), 1.0)
    return {name: x for name, x in op.state_dict().items() if "factor" not in name}


@pytest.mark.parametrize("config", ["g3b", "dog-b,order=PhiPhi", "g3b,base=silu,edge_scales=True", "static-b"])
def test_a_state_without_factors_is_the_same_function_and_learns_as_it_did(config: str) -> None:
    before = KArAtOperator(2, 9, config)
    state = old(before)
    after = KArAtOperator(2, 9, config)
    after.load_state_dict(state)  # strict
    q, k, v = torch.randn(3, 2, 2, 9, 8).unbind()
    for op in (before, after):
        optimizer = torch.optim.AdamW(op.parameters(), lr=1e-2)
        for _ in range(3):
            op.zero_grad()
            op.attend(q, k, v).square().sum().backward()
            optimizer.step()
    assert torch.equal(before.attend(q, k, v), after.attend(q, k, v))
    assert all(torch.equal(x, after.state_dict()[name]) for name, x in before.state_dict().items())


def test_setting_factors_leaves_every_function_what_it_is() -> None:
    op = KArAtOperator(2, 9, "rational-b,edge_scales=True").double()
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)
    functions, projector = op.edges(x), op.projector
    old(op)
    assert torch.allclose(op.edges(x), functions, atol=1e-12)
    assert torch.allclose(op.projector, projector, atol=1e-12)
    assert torch.equal(op.W, op.projector)


def test_factors_go_with_their_parameters_alone() -> None:
    model = nn.ModuleDict({"a": KArAtOperator(2, 9, "g3b")})
    weights = {name: x for name, x in model.state_dict().items() if "factor" not in name}
    completed = with_factors(model, weights)
    assert set(completed) == set(model.state_dict())
    assert completed["a.W_factor"] == 1
    del completed["a.W"]
    left = without_torn_layers(model, completed, weights)
    assert "a.W_factor" not in left
    assert "a.layers.0.factor" in left
    half = with_factors(model, {name: x.bfloat16() for name, x in weights.items()})
    assert {x.dtype for x in half.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("theirs", "mine"), [("", ",edge_scales=True"), (",edge_scales=True", "")])
def test_a_layer_that_fits_in_part_is_left_as_it_is(theirs: str, mine: str) -> None:
    source = nn.ModuleDict({"a": KArAtOperator(2, 9, f"g3b,base=silu{theirs}")}).state_dict()
    model = nn.ModuleDict({"a": KArAtOperator(2, 9, f"g3b,base=silu{mine}")})
    before = model["a"].edges(torch.linspace(-1, 1, 5))
    own = model.state_dict()
    fitting = {name: x for name, x in source.items() if name in own and x.shape == own[name].shape}
    taken = without_torn_layers(model, fitting, source)
    assert set(taken) == {"a.W", "a.W_factor"}
    model.load_state_dict(own | taken)
    assert torch.equal(model["a"].edges(torch.linspace(-1, 1, 5)), before)


def test_an_operator_is_built_where_tensors_are_no_numbers() -> None:
    moments.cache_clear()
    with FakeTensorMode():
        assert KArAtOperator(2, 9, "g3b,base=silu").W.shape == (2, 9, 12)
    assert KArAtOperator(2, 9, "g3b").layers[0].factor.flatten()[0] > 0


def test_another_grid_follows_a_change_of_factors_alone() -> None:
    op = KArAtOperator(2, 9, "g3b").requires_grad_(False)
    old, new = TokenGrid(0, 3, 3), TokenGrid(0, 4, 4)
    before = on_grid(op, old, new).projector
    op.W_factor.mul_(2)
    assert torch.equal(on_grid(op, old, new).projector, 2 * before)


@pytest.mark.parametrize("rank", [4, None])
def test_resampled_parameters_keep_their_size_and_rate(rank: int | None) -> None:
    op = KArAtOperator(2, 17, f"g3b,rank={rank}")
    before = {name: p.square().mean().sqrt() for name, p in op.named_parameters()}
    resample_operator(op, (4, 4), (8, 8), old_prefix=1)
    for name, p in op.named_parameters():
        assert 0.5 < p[..., 1:, :].square().mean().sqrt() / before[name] < 1.5, name
    wanted = dict(KArAtOperator(2, 65, op.config).named_buffers())
    for name, x in op.named_buffers():
        assert (x / wanted[name] > 0.4).all(), name
        assert (x / wanted[name] < 2.5).all(), name
