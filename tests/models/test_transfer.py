"""A student on its teacher's attention: by the formula, for every backbone, and without touching the teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from karat import create_model, record
from karat.models.attention import TransferredAttention
from karat.models.transfer import teacher_of, transfer_attention
from support.small_models import SMALL, images, small_model

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def vit(attention: str = "softmax", **values: object) -> nn.Module:
    return create_model("vit_tiny_patch16_224", attention=attention, **{**VIT, **values}).eval()


def taught(student: nn.Module, teacher: nn.Module) -> nn.Module:
    return transfer_attention(student, teacher, IMAGES[:1])


@pytest.mark.parametrize("attention", ["softmax", "g3b", "g2u,rank=3", "dog-b,order=PhiW,softmax_heads=1"])
def test_a_student_with_its_teachers_weights_is_its_teacher(attention: str) -> None:
    teacher, student = vit(attention), vit()
    student.load_state_dict(teacher.state_dict(), strict=False)  # all but the operators
    with torch.no_grad():
        torch.testing.assert_close(taught(student, teacher)(IMAGES), teacher(IMAGES), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_every_backbone_is_served(name: str) -> None:
    teacher, student = small_model(name, "g1b,rank=2").eval(), small_model(name).eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    batch = images(name)
    transfer_attention(student, teacher, batch[:1])
    with torch.no_grad():
        torch.testing.assert_close(student(batch), teacher(batch), atol=1e-4, rtol=1e-4)


def test_heads_and_blocks_are_mapped_as_documented() -> None:
    """4 blocks of 4 heads learn from 2 blocks of 2 heads: block i from i // 2, head h from h // 2."""
    teacher, student = vit("g2b"), vit(depth=4, num_heads=4, embed_dim=48)
    with record(teacher) as theirs, torch.no_grad():
        teacher(IMAGES)
    taught(student, teacher)
    inputs: dict[int, torch.Tensor] = {}
    for i, block in enumerate(student.blocks):  # type: ignore[arg-type]
        block.attn.register_forward_pre_hook(lambda module, args, i=i: inputs.__setitem__(i, args[0]))
    outputs: dict[int, torch.Tensor] = {}
    for i, block in enumerate(student.blocks):  # type: ignore[arg-type]
        block.attn.register_forward_hook(lambda module, args, out, i=i: outputs.__setitem__(i, out))
    with torch.no_grad():
        student(IMAGES)
        for i, block in enumerate(student.blocks):  # type: ignore[arg-type]
            attn = block.attn
            v = attn.v(inputs[i])
            heads = [
                theirs[f"blocks.{i // 2}.attn"].attention[:, h // 2] @ v[..., 12 * h : 12 * h + 12] for h in range(4)
            ]
            torch.testing.assert_close(attn.proj(torch.cat(heads, -1)), outputs[i], atol=1e-5, rtol=1e-5)


def test_all_of_the_student_learns_and_nothing_of_the_teacher() -> None:
    teacher = vit("g2b").requires_grad_(True)
    student = taught(vit(), teacher).train()
    names = dict(student.named_parameters())
    assert not [name for name in names if "qkv" in name or "q_norm" in name or "operator" in name]
    assert names["blocks.0.attn.v.weight"].shape == (24, 24)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, weight_decay=0.1)
    student(IMAGES).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names.values())
    optimizer.step()
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training


def test_recomputed_activations_give_the_same_gradients() -> None:
    teacher = vit("g2b")
    gradients = []
    for on in (False, True):
        torch.manual_seed(3)
        student = taught(vit(), teacher).train()
        student.set_grad_checkpointing(on)  # type: ignore[operator]
        student(IMAGES).square().sum().backward()
        gradients.append([p.grad for p in student.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_compiled_it_computes_the_same() -> None:
    student = taught(vit(), vit("g2b"))
    with torch.no_grad():
        expected = student(IMAGES), student(IMAGES.flip(0))
        student.compile(backend="eager")
        for images, plain in zip((IMAGES, IMAGES.flip(0)), expected, strict=True):
            torch.testing.assert_close(student(images), plain)


def test_the_teacher_keeps_its_precision_under_autocast() -> None:
    teacher = vit("g2b")
    student = taught(vit(), teacher)
    with record(teacher) as theirs, torch.no_grad():
        teacher(IMAGES)
    with record(student) as mine, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert student(IMAGES).dtype == torch.bfloat16
    assert torch.equal(mine["blocks.1.attn"].attention, theirs["blocks.1.attn"].attention)


def test_a_copy_has_a_teacher_of_its_own() -> None:
    student = taught(vit(), vit("g2b"))
    again = copy.deepcopy(student)
    first, second = teacher_of(student), teacher_of(again)
    assert first is not None
    assert second is not None
    assert first is not second
    with torch.no_grad():
        expected = student(IMAGES)
        for parameter in first.parameters():
            parameter.zero_()
        torch.testing.assert_close(again(IMAGES), expected, atol=0, rtol=0)
    assert teacher_of(vit()) is None


def test_what_is_recorded_is_the_teachers_and_nothing_is_left_behind() -> None:
    teacher = vit("g2b")
    student = taught(vit(), teacher)
    with record(teacher) as theirs, torch.no_grad():
        teacher(IMAGES)
    with record(student) as mine, torch.no_grad():
        student(IMAGES)
    for name, entry in theirs.items():
        assert torch.equal(mine[name].attention, entry.attention)
        assert torch.equal(mine[name].scores, entry.scores)
    with pytest.raises(ValueError, match="no teacher has looked"):
        student.forward_features(IMAGES)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({}, {"num_heads": 3}, r"blocks\.0\.attn has 2 heads, the teacher's blocks\.0\.attn 3: .* multiple of 3"),
        ({"patch_size": 8}, {}, "5 tokens, the teacher's .* 17"),
        ({}, {"img_size": 32}, "the teacher can't take"),
        ({}, {"in_chans": 1}, "the teacher can't take"),
        ({"attention": "g3b"}, {}, "attention='softmax'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(student: dict, teacher: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        taught(vit(**student), vit(**teacher))
    with pytest.raises(ValueError, match="no attention"):
        taught(nn.Linear(2, 2), vit())


def test_values_are_the_fused_maps_last_third() -> None:
    model = vit(qkv_bias=False)
    qkv = model.blocks[0].attn.qkv.weight.clone()  # type: ignore[union-attr, index]
    student = taught(model, vit())
    attention = student.blocks[0].attn  # type: ignore[index]
    assert isinstance(attention, TransferredAttention)
    assert attention.v.bias is None
    assert torch.equal(attention.v.weight, qkv[48:])


def test_images_may_be_given_by_name() -> None:
    """timm's models call them x."""
    student = transfer_attention(small_model("vit"), small_model("vit"), images("vit")).eval()
    x = images("vit")
    assert torch.equal(student(x=x), student(x))


def test_no_model_is_its_own_teacher() -> None:
    model = small_model("vit")
    with pytest.raises(ValueError, match=r"student and teacher are one model.*give copy.deepcopy\(teacher\)"):
        transfer_attention(model, model, images("vit"))
    assert model(images("vit")).isfinite().all()
