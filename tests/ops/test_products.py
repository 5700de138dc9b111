"""The product with a factor that all images share: the same numbers, less kept."""

from __future__ import annotations

import pytest
import torch

from karat import KArAtOperator
from karat.ops import products
from karat.ops.products import low_rank_product, product_for_tokens, shared_product

PRODUCTS = {"shared": (shared_product, (3, 2, 5)), "tokens": (product_for_tokens, (4, 3, 6, 5))}
X = (4, 3, 5, 2)


@pytest.fixture(params=[0, products.FEW_TOKENS], ids=["head by head", "heads at once"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "FEW_TOKENS", request.param)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", PRODUCTS)
def test_equals_the_product_and_its_two_derivatives(name: str) -> None:
    product, shape = PRODUCTS[name]
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x = torch.randn(X, dtype=torch.float64).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    torch.testing.assert_close(product(w, x), w @ x)
    assert torch.autograd.gradcheck(product, (w, x))
    assert torch.autograd.gradgradcheck(product, (w, x))


@pytest.mark.usefixtures("few")
def test_both_products_at_once() -> None:
    """Their values and two derivatives, any of the gradients alone, the same bits twice."""
    h, w, x = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 2, 3, 2), (2, 4, 2), (2, 4, 2, 3)))
    leaves = [leaf.requires_grad_() for leaf in (h, w, x.transpose(1, 2))]
    plain = h @ (w.transpose(-2, -1) @ leaves[2])
    out = low_rank_product(*leaves)
    torch.testing.assert_close(out, plain)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.autograd.gradcheck(low_rank_product, leaves)
    assert torch.autograd.gradgradcheck(low_rank_product, leaves)
    upstream = torch.randn_like(out)
    exact = torch.autograd.grad(plain, leaves, upstream)
    for wanted in range(3):
        alone = [leaf.detach().requires_grad_(place == wanted) for place, leaf in enumerate(leaves)]
        again = [torch.autograd.grad(low_rank_product(*alone), alone[wanted], upstream)[0] for _ in range(2)]
        torch.testing.assert_close(again[0], exact[wanted])
        assert torch.equal(*again)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted: int, name: str) -> None:
    product, shape = PRODUCTS[name]
    factors = [torch.randn(shape), torch.randn(X)]
    factors[wanted].requires_grad_()
    (got,) = torch.autograd.grad(product(*factors).sum(), factors[wanted])
    (exact,) = torch.autograd.grad((factors[0] @ factors[1]).sum(), factors[wanted])
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("name", PRODUCTS)
def test_autocast_gives_each_factor_a_gradient_of_its_own_precision(name: str) -> None:
    product, shape = PRODUCTS[name]
    w, x = torch.randn(shape, requires_grad=True), torch.randn(X, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = product(w, x)
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


def test_output_lies_as_a_model_joins_its_heads() -> None:
    op = KArAtOperator(3, 17, "g1b,rank=2")
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 3, 17, 8).unbind())
    assert op.attend(q, k, v).transpose(1, 2).is_contiguous()


def test_torch_func_sees_through_them() -> None:
    op = KArAtOperator(2, 6, "g2b,impl=reference").double()
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64).unbind()

    def loss(v: torch.Tensor) -> torch.Tensor:
        return op.attend(q, k, v).square().sum()

    leaf = v.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(v), wanted)
