"""What every order promises, over the registry: a new one is covered by being listed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from karat import KArAtConfig, KArAtOperator
from karat.operator.orders import BLIND, ORDERS
from karat.ops import Call, basis_sums

H, N, D = 2, 9, 4


def config_of(key: tuple[str, bool], init: str = "default") -> KArAtConfig:
    """A configuration that makes this order, with places where it asks for them."""
    name, has_rank = key
    settings = {"basis": name} if name in BLIND else {"basis": "fourier(grid=2)", "order": name}
    for position in (None, "query"):
        try:
            return KArAtConfig(**settings, rank=3 if has_rank else None, position=position, init=init)
        except ValueError as error:
            refused = error
    raise refused


@pytest.mark.parametrize("key", ORDERS)
def test_values_may_come_first_or_last(key: tuple[str, bool]) -> None:
    """O is the same where v is folded into the sums, and where σ is made and multiplied."""
    op = KArAtOperator(H, N, config_of(key)).double()
    assert op.order is ORDERS[key]
    q, k, v = torch.randn(3, 1, H, N, D, dtype=torch.float64).unbind()
    call = Call(q, k, D**-0.5)
    outputs = []
    for values in (v, None):
        summed = op.order.to_sum(op, values)
        sums = op.order.form(op, call) if summed is None else basis_sums(call, *summed)
        outputs.append(op.order.finish(op, sums, values))
    torch.testing.assert_close(outputs[0], outputs[1] @ v)
    sigma = op.order.finish(op, op.order.of_scores(op, call.scores(), None), None)
    torch.testing.assert_close(sigma.expand(1, H, N, N), op(call.scores()))


@pytest.mark.parametrize("key", ORDERS)
@torch.no_grad()
def test_power_is_what_it_says_and_scales(key: tuple[str, bool]) -> None:
    op = KArAtOperator(H, N, config_of(key, "paper")).double()  # with factors of one, as at every start
    for parameter in op.parameters():
        nn.init.normal_(parameter, std=0.1)
    measured = op(torch.randn(4096, H, N, N, dtype=torch.float64)).square().sum(-1).mean((0, 2))
    torch.testing.assert_close(op.order.power(op), measured, rtol=0.1, atol=0)
    scores = torch.randn(1, H, N, N, dtype=torch.float64)
    before, factor = op(scores), torch.tensor([2.0, 0.5], dtype=torch.float64)
    op.order.scale(op, factor)
    torch.testing.assert_close(op(scores), factor[:, None, None] * before)
