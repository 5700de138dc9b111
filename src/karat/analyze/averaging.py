"""How much of a model's accuracy rests on attention that follows the image: it is averaged over images (PAPA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from karat.analyze.ablation import AblationOutcome, check_labelled
from karat.analyze.landscape import evaluate
from karat.models.attach.mode import attached
from karat.models.attention import Intermediate, TransferredAttention
from karat.models.backbones import attention_sites
from karat.models.differential import DifferentialAttention
from karat.models.evaluating import evaluating
from karat.models.transfer import look


def averaged(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 128) -> AblationOutcome:
    """Evaluate a model whose whole attention, softmax's as well, is its mean over these images in every block.

    σ (B,H,N,N) becomes E_b[σ_b], taken in the whole model; values and all else still follow the image, and nothing is
    trained again (Hassid et al. 2022, PAPA, arXiv 2211.03495). images (B,C,height,width), labels (B,).

    Raises ValueError for attention in windows, differential, a teacher's or found in a model that karat has no record
    of, and for fewer than two images or images without a label each.
    """
    check_labelled(images, labels)
    sites = attention_sites(model)
    strange = (DifferentialAttention, TransferredAttention)
    if not sites or any(s.kind.windows or attached(s.module) or isinstance(s.module, strange) for s in sites):
        raise ValueError(
            f"attention of {type(model).__name__} can't be replaced by its mean over images; this needs a ViT, DeiT or "
            "ConViT with attention of its own, in no windows and not differential"
        )
    sums: dict[str, Tensor] = {}
    with evaluating(model):
        for part in images.split(batch_size):
            for name, seen in look(model, part).items():
                sums[name] = sums.get(name, torch.zeros(())) + seen.attention.float().sum(0)
    with _attending(model, {name: total / len(images) for name, total in sums.items()}):
        loss, top1 = evaluate(model, images, labels, batch_size=batch_size)
    return AblationOutcome(top1, loss)


@contextmanager
def _attending(model: nn.Module, maps: dict[str, Tensor]) -> Iterator[None]:
    """The model mixes values by these maps, (H,N,N) by the attention's name, while the context is open."""
    sites = attention_sites(model)
    try:
        for site in sites:
            block = TransferredAttention(site.module, site.kind.values(site.module))
            block.register_forward_pre_hook(partial(_give, maps[site.name]))
            model.set_submodule(site.name, block)
        yield
    finally:
        for site in sites:
            model.set_submodule(site.name, site.module)


def _give(sigma: Tensor, block: TransferredAttention, args: tuple[Tensor, ...]) -> None:
    whole = sigma.expand(len(args[0]), *sigma.shape)
    block.given = Intermediate(whole, whole)
