"""Operators put where attention was found."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from karat.models.attach.example import Example, described, example_of
from karat.models.attach.find import Found, check_whole, find
from karat.models.attach.mode import Attached, keep_to_module
from karat.operator.config import KArAtConfig
from karat.operator.operator import KArAtOperator
from karat.operator.rules import OF_GRIDS, refuse

Choose = Callable[[list[int], int], list[int]]


@dataclass(frozen=True)
class Sites:
    """What was found in a model with weights, for its twin on the meta device, where no example can be run."""

    found: list[Found]

    def on(self, model: nn.Module, _: Any) -> list[Found]:
        """The same places of another model."""
        return [replace(site, module=model.get_submodule(site.name)) for site in self.found]


@contextmanager
def _fused(model: nn.Module) -> Iterator[list[Any]]:
    """timm's modules that could call fused attention and don't; what is left in the list goes back afterwards."""
    plain: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", None) is False]
    back = list(plain)
    for module in plain:
        module.fused_attn = True
    try:
        yield back
    finally:
        for module in back:
            module.fused_attn = False


def attach(model: nn.Module, config: KArAtConfig, example: Example | Sites | None, choose: Choose, name: str) -> None:
    """Operators for the chosen calls of attention of any model; `name` is a shared one's.

    choose: (indices that can be converted, number of all) -> those to convert.

    Raises ValueError where no example can be made or taken, there is no attention, or none that can be served.
    """
    check_whole(model)
    kind = type(model).__name__
    refuse(config, OF_GRIDS, f"karat doesn't know how the tokens of {kind} lie; leave it out")
    given: Any = example_of(model) if example is None else example
    look = example.on if isinstance(example, Sites) else find
    with _fused(model) as back:
        try:
            found = look(model, given)
        except ValueError:
            if not back:
                raise
            for module in back:
                module.fused_attn = False
            found = look(model, given)
        if not found:
            raise ValueError(
                f"{kind} has no attention that karat knows: its forward pass calls neither "
                "F.scaled_dot_product_attention nor softmax over scores in a module of attention"
            )
        reasons = [site.refusal(config) for site in found]
        able = [i for i, reason in enumerate(reasons) if reason is None]
        stays = "; ".join(
            f"{site.name or 'the model'} ({type(site.module).__name__}): {reason}"
            for site, reason in zip(found, reasons, strict=True)
            if reason is not None
        )
        if not able:
            raise ValueError(f"no attention of {kind} can be converted: {stays}")
        stays = "; ".join(filter(None, (stays, _missed(model, found))))
        chosen = choose(able, len(found))
        unable = [i for i in chosen if i not in able]
        if unable:
            raise ValueError(
                f"blocks={config.blocks}: {found[unable[0]].name} can't be converted: {reasons[unable[0]]}; blocks "
                f"that can: {', '.join(map(str, able))}"
            )
        operators = _operators(config, [found[i] for i in chosen])  # first: an error leaves the model as it was
        back[:] = [module for module in back if module not in {found[i].module for i in chosen}]
    shared = config.sharing == "universal"
    if shared and operators:
        model.add_module(name, operators[0][0])
    own = dict(zip(chosen, operators, strict=True))
    for i, site in enumerate(found):
        place = _place(site, own.get(i), shared)
        place.index, place.inside = i, any(_is_within(site.name, other.name) for other in found)
    _without_nested(model)
    settings: Any = getattr(model, "config", None)
    if hasattr(settings, "to_dict") and not isinstance(given, Sites):  # transformers': what save_pretrained writes
        settings.karat_attention, settings.karat_example = str(config), described(given)
    if stays and config.blocks is None:
        warnings.warn(f"stays softmax: {stays}", stacklevel=3)


def _missed(model: nn.Module, found: list[Found]) -> str:
    """Modules of the kinds that were found to call for attention, which the example didn't reach."""
    kinds, known = {type(site.module) for site in found}, {site.module for site in found}
    return "; ".join(
        f"{name} ({type(module).__name__}): the example doesn't call it"
        for name, module in model.named_modules()
        if type(module) in kinds and module not in known
    )


def _is_within(name: str, other: str) -> bool:
    """Whether a module is in another, by their names."""
    return name != other and (not other or name.startswith(f"{other}."))


def _place(site: Found, operators: list[KArAtOperator] | None, shared: bool) -> Attached:
    """The module's forward taken over."""
    module = site.module
    if operators is not None and not shared:
        module.operator = operators[0] if len(operators) == 1 else nn.ModuleList(operators)
    place = Attached(
        module,
        site.layouts,
        operators[0] if operators is not None and shared else None,
        written=site.written,
        learned=operators is not None,
        windows=site.windows,
    )
    if isinstance(module, nn.MultiheadAttention):
        module.register_forward_pre_hook(keep_to_module)
    module.forward, module._replicate_for_data_parallel = place, place.replica
    return place


def _without_nested(model: nn.Module) -> None:
    """Padding stays a mask where an encoder with operators would pack its inputs into nested tensors."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any("forward" in m.__dict__ for m in module.modules()):
            module.use_nested_tensor = module.enable_nested_tensor = False


def _operators(config: KArAtConfig, sites: list[Found]) -> list[list[KArAtOperator]]:
    """The operators of each place."""
    if config.sharing == "universal":
        sizes = {(heads, keys) for site in sites for heads, _, keys in site.served}
        if len(sizes) > 1:
            listed = ", ".join(f"{site.name} {h}x{n}" for site in sites for h, _, n in site.served)
            raise ValueError(f"sharing='universal' needs equal heads and tokens in all blocks, got {listed}")
    made: list[list[KArAtOperator]] = []
    for site in sites:
        if config.sharing == "universal" and made:
            made.append([made[0][0]] * len(site.served))
            continue
        new = [KArAtOperator(heads, keys, config) for heads, _, keys in site.served]
        made.append([_beside(op, site.module) for op in (new[:1] if config.sharing == "universal" else new)])
    return made


def _beside(operator: KArAtOperator, module: Any) -> KArAtOperator:
    """An operator on the device, in the precision and the mode of a module."""
    like: Tensor | None = next((p for p in module.parameters() if p.is_floating_point()), None)
    operator = operator if like is None else operator.to(device=like.device, dtype=like.dtype)
    return operator.train(module.training)


def key_numbers(model: nn.Module, example: Example) -> dict[str, list[int]]:
    """The numbers of keys of every attention for an example, whatever operators were made for."""
    places = [
        (m, m.__dict__.pop("forward")) for m in model.modules() if isinstance(m.__dict__.get("forward"), Attached)
    ]
    try:
        for module, place in places:
            if place.before is not None:
                module.forward = place.before
        return {site.name: [keys for _, _, keys in site.served] for site in find(model, example)}
    finally:
        for module, place in places:
            module.__dict__["forward"] = place
