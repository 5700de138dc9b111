"""torch.compile(fullgraph=True) of converted models equals eager, forward and backward."""

from __future__ import annotations

import pytest
import torch

from karat import KArAtOperator, create_model
from support.small_models import BACKBONES

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
MODELS = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "vit, residual": ("vit_tiny_patch16_224", SMALL),
    "convit": ("convit_tiny", {**SMALL, "depth": 2, "local_up_to_layer": 1}),
    # two blocks: plain and shifted windows; drop path would make the two runs draw differently
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 16,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 24,
            "depths": (2,),
            "num_heads": (2,),
            "drop_path_rate": 0.0,
        },
    ),
}


def test_every_backbone_is_compiled() -> None:
    assert {*BACKBONES} <= {name.split(",")[0] for name in MODELS}


@pytest.mark.slow
# torch's own compiler warns of its internals; what is tested is that nothing of ours breaks the graph.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_compile_without_a_break(name: str) -> None:
    model_name, settings = MODELS[name]
    attention = "g2b,rank=4,residual=softmax" if "residual" in name else "g2b,rank=4"
    model = create_model(model_name, attention=attention, num_classes=10, **settings).train()
    torch.compiler.reset()
    images = torch.randn(2, 3, 16, 16)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        logits = forward(images)
        gradients = torch.autograd.grad(logits.square().sum(), [p for p in model.parameters() if p.requires_grad])
        results.append((logits, *gradients))
    for wanted, got in zip(*results, strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm() + 1e-5


SETTINGS = ("dog-b", "g2b,order=PhiW", "g2b,order=PhiPhi", "g2b,rank=None", "g2b,residual=softmax", "g2b,simplex=row")
VARIANTS = ("g2b,rank=None,order=Pointwise", "static-b,residual=softmax,gate=0.5")
VARIANTS += ("g2b,rank=3,order=Pointwise,position=query",)
VARIANTS += ("g2b,position=query",)
RESIDUAL = ("g2b,rank=None,residual=softmax", "g2b,order=PhiPhi,residual=softmax", "dog-b,residual=softmax")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("config", [*SETTINGS, *VARIANTS, *RESIDUAL, "g2b,simplex=rank", "g2b,softmax_heads=1"])
def test_the_operator_traces_in_every_setting(config: str, masked: bool) -> None:
    torch.compiler.reset()
    op = KArAtOperator(3, 17, config)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 3, 17, 8).unbind())
    mask = torch.rand(1, 1, 17, 17) > 0.2 if masked else None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return op.attend(q, k, v, mask=mask)

    wanted = attend(q, k, v)
    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
