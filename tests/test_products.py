"""The product with a factor that all images share: the same numbers, less kept."""

from __future__ import annotations

import pytest
import torch

from karat import KArAtOperator
from karat.products import shared_product


def test_equals_the_product_and_its_two_derivatives() -> None:
    w = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(shared_product(w, x), w @ x)
    assert torch.autograd.gradcheck(shared_product, (w, x))
    assert torch.autograd.gradgradcheck(shared_product, (w, x))


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted: int) -> None:
    factors = [torch.randn(3, 2, 5), torch.randn(4, 3, 5, 2)]
    factors[wanted].requires_grad_()
    (got,) = torch.autograd.grad(shared_product(*factors).sum(), factors[wanted])
    (exact,) = torch.autograd.grad((factors[0] @ factors[1]).sum(), factors[wanted])
    torch.testing.assert_close(got, exact)


def test_autocast_gives_each_factor_a_gradient_of_its_own_precision() -> None:
    w, x = torch.randn(3, 2, 5, requires_grad=True), torch.randn(4, 3, 5, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shared_product(w, x)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), (w, x))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2


@pytest.mark.parametrize("impl", ["tiled", "auto"])
def test_attention_keeps_no_copy_of_queries_keys_and_values(impl: str) -> None:
    """They are cut from one tensor, as a model's are; everything else that is kept is small."""
    op = KArAtOperator(3, 197, f"g1b,rank=2,impl={impl}")
    qkv = torch.randn(2, 197, 3, 3, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        op.attend(*qkv.permute(2, 0, 3, 1, 4).unbind())
    parameters = {parameter.untyped_storage().data_ptr() for parameter in op.parameters()}
    others = sum(size for place, size in kept.items() if place not in parameters | {qkv.data_ptr()})
    assert others <= 0.1 * qkv.numel() * qkv.element_size()
