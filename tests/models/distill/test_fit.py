"""Whole models fitted to their softmax teachers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import karat
from karat import KArAtOperator
from karat.models.distill import DistillOptions, FitOptions, distill, fit_operators, gauge, measure_blocks
from karat.models.distill.closed_form import fit_operator
from karat.train.convert import Convert
from support.small_models import BACKBONES, SMALL, small_model


def pair(name: str = "vit", attention: str = "g2b,rank=6") -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    """Student, teacher whose attention isn't flat, images."""
    teacher = small_model(name).eval()
    with torch.no_grad():
        for module in teacher.modules():
            if hasattr(module, "qkv"):
                module.qkv.weight.mul_(8)
    student = karat.karatize(copy.deepcopy(teacher), attention).eval()
    side = SMALL[name][1]["img_size"]
    return student, teacher, list(torch.randn(6, 8 if name == "swin" else 16, 3, side, side).unbind())


@pytest.mark.parametrize("name", [*BACKBONES, "vit_registers", "deit_distilled"])
def test_fitted_operators_explain_what_random_ones_do_not(name: str) -> None:
    student, teacher, images = pair(name)
    before = measure_blocks(student, teacher, images[4:])
    fit_operators(student, teacher, lambda: images[:4])
    after = measure_blocks(student, teacher, images[4:])
    assert [block.name for block in after] == [n for n, m in student.named_modules() if hasattr(m, "operator")]
    for old, new in zip(before, after, strict=True):
        assert new.explained > max(old.explained, 0.5)
        assert new.followed > old.followed
    x = images[5]
    gap = (teacher(x) - teacher(x).mean(0)).square().sum()
    assert (student(x) - teacher(x)).square().sum() < gap


@pytest.mark.parametrize(
    "attention", ["g2u", "g2b,softmax_heads=(0,)", "g2b,blocks=(1,)", "g2b,rank=4,order=PhiPhi", "dog-b,simplex=row"]
)
def test_every_setting_can_be_fitted(attention: str) -> None:
    student, teacher, images = pair(attention=attention)
    before = measure_blocks(student, teacher, images[4:])
    fit_operators(student, teacher, lambda: images[:4])
    after = measure_blocks(student, teacher, images[4:])
    assert sum(b.explained for b in after) > sum(b.explained for b in before)
    assert len(after) == (1 if "blocks" in attention else 2)


@pytest.mark.parametrize(
    "attention",
    [
        "static-b",
        "g2b,rank=None,order=Pointwise",
        "g2b,order=Pointwise,position=query",
    ],
)
def test_what_has_no_closed_form_says_so(attention: str) -> None:
    with pytest.raises(ValueError, match="can't be fitted to softmax in closed form; use another attention, or resid"):
        Convert(teacher="run", attention=attention)
    with pytest.raises(ValueError, match="can't be fitted"):
        fit_operator(KArAtOperator(1, 4, attention), lambda: iter(()))
    assert Convert(teacher="run", attention=f"{attention},residual=softmax").attention.startswith(attention)


def test_models_in_training_are_fitted_as_in_evaluation() -> None:
    """What drops paths at random said how the student was to be, and stood in what was measured."""
    student, teacher, images = pair(attention="g2b,rank=12")
    for model in (student, teacher):
        model.train()
        for block in model.blocks:
            block.drop_path1 = nn.Dropout(0.5)
    fit_operators(student, teacher, lambda: images[:4])
    distill(student, teacher, lambda: images[:4], DistillOptions(lr=1e-4), batches=4)
    assert all(module.training for model in (student, teacher) for module in model.modules())
    measured = [measure_blocks(student, teacher, images[4:])]
    student.eval(), teacher.eval()
    assert measured == [measure_blocks(student, teacher, images[4:])]
    other, _, _ = pair(attention="g2b,rank=12")
    other.load_state_dict(karat.karatize(copy.deepcopy(teacher), "g2b,rank=12").state_dict())
    fit_operators(other, teacher, lambda: images[:4])
    distill(other, teacher, lambda: images[:4], DistillOptions(lr=1e-4), batches=4)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_are_summed_in_float32(dtype: torch.dtype) -> None:
    shares = {}
    for kind in (torch.float32, dtype):
        torch.manual_seed(0)
        student, teacher, images = pair(attention="g2b,rank=12")
        student, teacher, images = student.to(kind), teacher.to(kind), [x.to(kind) for x in images]
        fit_operators(student, teacher, lambda images=images: images[:4])
        shares[kind] = measure_blocks(student.float(), teacher.float(), [x.float() for x in images[4:]])
    for half, single in zip(shares[dtype], shares[torch.float32], strict=True):
        assert half.explained > single.explained - 0.02
        assert half.followed > single.followed - 0.02


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"depth": 1}, "the teacher has no blocks.1.attn"),
        ({"num_heads": 6}, "3 heads of width 8 over 17 tokens and 6 heads of width 4 over 17 tokens"),
    ],
)
def test_a_teacher_of_other_sizes_is_refused(other: dict, says: str) -> None:
    student, _, images = pair()
    teacher = small_model("vit", **other).eval()
    with pytest.raises(ValueError, match=says):
        fit_operators(student, teacher, lambda: images)


@pytest.mark.parametrize("gate", ["0.5", "1"])
def test_a_random_operator_beside_softmax_is_refused(gate: str) -> None:
    attention = f"g2b,rank=2,residual=softmax,gate={gate}"
    says = f"gate={float(gate)} beside softmax adds an operator that starts at random.*init_scale=0"
    with pytest.raises(ValueError, match=says):
        Convert(teacher="run", attention=attention)
    student, teacher, images = pair(attention=attention)
    with pytest.raises(ValueError, match=says):
        fit_operators(student, teacher, lambda: images)


@pytest.mark.parametrize("start", ["", ",gate=1,init_scale=0"])
def test_residual_softmax_is_its_teacher(start: str) -> None:
    student, teacher, images = pair(attention=f"g2b,residual=softmax{start}")
    state = {key: value.clone() for key, value in student.state_dict().items()}
    assert fit_operators(student, teacher, lambda: images) is student
    assert all(torch.equal(value, state[key]) for key, value in student.state_dict().items())
    for block in measure_blocks(student, teacher, images):
        assert block.explained == pytest.approx(1, abs=1e-6)
        assert block.followed == pytest.approx(1, abs=1e-6)


def test_shift_and_scale_of_the_scores() -> None:
    """Softmax doesn't see the shift of its keys; rows are centred by it; the scale multiplies the scores."""
    _, teacher, _ = pair()
    attn, x = teacher.blocks[0].attn, torch.randn(4, 17, 24)
    from karat.models.attention import token_inputs

    before, expected = token_inputs(attn, x), attn(x)
    heads = [0, 2]
    gauge.shift_keys(attn, gauge.key_shift([before]), heads)
    torch.testing.assert_close(attn(x), expected, atol=1e-4, rtol=1e-3)
    after = token_inputs(attn, x)
    means = (before.scores.mean(-1).square().mean((0, 2)), after.scores.mean(-1).square().mean((0, 2)))
    assert (means[1] < means[0])[heads].all()
    assert torch.equal(after.k[:, 1], before.k[:, 1])
    scale = torch.tensor([0.5, 7.0, 3.0])
    gauge.scale_queries(attn, scale, heads)
    kept = scale.clone()
    kept[1] = 1
    torch.testing.assert_close(token_inputs(attn, x).scores, after.scores * kept[:, None, None], atol=1e-4, rtol=1e-4)
    sizes = gauge.score_scale([token_inputs(attn, x)], 3.0)
    assert sizes.shape == (3,)


def test_nothing_else_moves() -> None:
    student, teacher, images = pair()
    fit_operators(student, teacher, lambda: images, FitOptions(fold=False, refit_projection=False))
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        assert "operator" in name or torch.equal(value, theirs[name])
    fit_operators(student, teacher, lambda: images)
    changed = {n for n, v in student.state_dict().items() if "operator" not in n and not torch.equal(v, theirs[n])}
    assert {name.rsplit(".", 2)[1] for name in changed} == {"qkv", "proj"}


def test_folding_is_left_out_behind_norms() -> None:
    student, teacher, images = pair("vit_norms")
    fit_operators(student, teacher, lambda: images[:2])
    assert torch.equal(student.blocks[0].attn.qkv.weight, teacher.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("inputs", ["student", "teacher"])
@pytest.mark.parametrize("scope", ["operator", "attention"])
@pytest.mark.parametrize("attention", ["g1b", "dog-b,rank=3", "rational-b,rank=3,order=PhiW"])
def test_distillation_lowers_the_error(attention: str, scope: str, inputs: str) -> None:
    student, teacher, images = pair(attention=attention)
    state = {key: value.clone() for key, value in student.state_dict().items()}
    options = DistillOptions(epochs=4, lr=3e-3, scope=scope, inputs=inputs)
    errors = distill(student, teacher, lambda: images, options, batches=len(images))
    assert len(errors) == 4
    assert errors[-1] < errors[0]
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, state[name])}
    assert any("operator" in name for name in changed)
    assert all("operator" in name or (scope == "attention" and ".attn." in name) for name in changed)
    assert all(parameter.grad is None for parameter in student.parameters())


def empty() -> Iterator[torch.Tensor]:
    return iter(())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s, t, x: fit_operators(s, t, empty), "no images"),
        (lambda s, t, x: fit_operators(t, t, lambda: x), "no learnable attention"),
        (lambda s, t, x: fit_operators(s, s, lambda: x), "must be softmax"),
        (lambda s, t, x: measure_blocks(s, t, []), "no images"),
        (lambda s, t, x: distill(s, t, empty, DistillOptions(), batches=1), "no images"),
        (lambda s, t, x: FitOptions(ridge=-1), "ridge"),
        (lambda s, t, x: DistillOptions(scope="all"), "unknown scope"),
        (lambda s, t, x: DistillOptions(lr=0), "lr"),
        (lambda s, t, x: DistillOptions(epochs=-1), "epochs"),
    ],
)
def test_bad_input(act, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        act(*pair())


def test_a_projection_without_bias_is_fitted() -> None:
    student, teacher, images = pair()
    for model in (student, teacher):
        for block in model.blocks:
            block.attn.proj.bias = None
    before = measure_blocks(student, teacher, images[4:])
    fit_operators(student, teacher, lambda: images[:4])
    after = measure_blocks(student, teacher, images[4:])
    assert sum(b.explained for b in after) > sum(b.explained for b in before)
    assert all(block.attn.proj.bias is None for block in student.blocks)
