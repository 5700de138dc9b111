"""Scores and attention of every block, handed out while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from karat.models.attach.mode import attached, observed
from karat.models.attention import Intermediate
from karat.models.backbones import AttentionSite, attention_kinds, attention_sites
from karat.operator.operator import KArAtOperator


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Intermediate]]:
    """Collect the scores and the attention of every block, learnable and softmax alike, while the context is open.

    Yields a dict from module names ("blocks.3.attn"; "blocks.3.attn.0" of one that calls for attention several times)
    to `Intermediate`, filled by each forward pass; a later pass
    overwrites. The model's output is untouched: scores and σ are computed beside it from the same inputs, so a pass
    costs more time, and N×N memory a block; under torch.no_grad() no graph is kept.

    Raises ValueError if the model has no attention that is known.

    >>> import karat, torch
    >>> model = karat.create_model("vit_tiny_patch16_224", attention="g3b", img_size=32, depth=2).eval()
    >>> with karat.record(model) as intermediates, torch.no_grad():
    ...     _ = model(torch.randn(1, 3, 32, 32))
    >>> intermediates["blocks.1.attn"].attention.shape
    torch.Size([1, 3, 5, 5])
    """
    sites = attention_sites(model)
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no attention that karat.record knows; it knows "
            + ", ".join(attention.__name__ for attention in attention_kinds())
        )
    intermediates: dict[str, Intermediate] = {}

    def hook(site: AttentionSite) -> Callable[..., None]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            intermediates[site.name] = site.kind.look(module, *args, **kwargs)

        return after_forward

    def noted(name: str, calls: int) -> Callable[[int, Intermediate], None]:
        def observe(number: int, found: Intermediate) -> None:
            intermediates[name if calls == 1 else f"{name}.{number}"] = found

        return observe

    with ExitStack() as open_:
        for site in sites:
            place = attached(site.module)
            if place is not None:
                open_.enter_context(observed(place, noted(site.name, len(place.layouts))))
            else:
                handle = site.module.register_forward_hook(hook(site), with_kwargs=True)
                open_.callback(handle.remove)
        yield intermediates


def recorded(model: nn.Module) -> list[tuple[AttentionSite, KArAtOperator | None]]:
    """What `record` has an entry for, in its order: the attention, and its operator; None where it keeps softmax."""
    found: list[tuple[AttentionSite, KArAtOperator | None]] = []
    for site in attention_sites(model):
        place = attached(site.module)
        if place is None:
            found.append((site, getattr(site.module, "operator", None)))
        else:
            found += [(site, place.operator(i)) for i, layout in enumerate(place.layouts) if layout is not None]
    return found
