"""Models by name: timm's, with the attention and the MLP that are asked for, and their registration with timm."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from timm.models import load_pretrained
from torch import nn

from karat.basis.specs import parse_call
from karat.errors import first_line
from karat.models.attach.example import example_of
from karat.models.features import Finish, create_finished
from karat.models.kan.mlp import replace_mlp
from karat.models.kan.peers import DEEP_KAN, register_peers
from karat.models.karatize import karatize
from karat.models.positions import SINCOS, start_as_sincos
from karat.models.regrid import check_patches
from karat.models.starts import check_start, start_attention
from karat.operator.config import KArAtConfig

PREFIX = "karat_"

# timm's models that are also registered as karat_<name>, and the attention they have by default (paper Table 1).
REGISTERED: dict[str, str] = {
    "vit_tiny_patch16_224": "g3b",
    "vit_small_patch16_224": "g3b",
    "vit_base_patch16_224": "g1b",
    "deit_tiny_patch16_224": "g3b",
    "deit_small_patch16_224": "g3b",
    "deit_base_patch16_224": "g1b",
    "deit_tiny_distilled_patch16_224": "g3b",
    "deit_small_distilled_patch16_224": "g3b",
    "deit_base_distilled_patch16_224": "g1b",
    "convit_tiny": "g3b",
    "convit_small": "g3b",
    "convit_base": "g1b",
    "swin_tiny_patch4_window7_224": "g3b",
    "swin_small_patch4_window7_224": "g3b",
    "swin_base_patch4_window7_224": "g1b",
}


class ModelArgumentsError(ValueError):
    """timm can't build the model from these arguments; what it raised is the cause."""


def create_model(
    name: str, attention: KArAtConfig | str | None = None, mlp: str | None = None, **timm_kwargs: Any
) -> nn.Module:
    """A timm model with the attention and MLP that are asked for: timm.create_model, `karat.karatize`, `replace_mlp`.

    Args:
        name: a name that timm knows. The registered names karat_vit_tiny_patch16_224 etc. have a default attention,
            the peers' (`karat.models.kan.PEERS`: kat_tiny_patch16_224, vit_kan_..., deit_kan_...) KAN layers for MLPs.
            Settings may follow in parentheses: "deep_kan(order=5,layers=(10,10))".
        attention: a `KArAtConfig` or its short name ("g3b", "softmax", ...); None means the default of a registered
            name, softmax otherwise.
        mlp: "kan", "grkan", "fourierkan", "fastkan" or one with settings, "kan(grid=5)" (`models.kan.replace_mlp`);
            "mlp" or None keeps the model's own. With pretrained=True, grkan takes over the MLPs' weights.
        timm_kwargs: passed on to timm: num_classes, img_size, patch_size, embed_dim, depth, pretrained, ...
            pretrained=True loads the softmax model's weights and draws the operators anew, and so does
            checkpoint_path, except that for registered names it loads the whole converted model. Ours are
            pos_embed="sincos" and its pos_strength, 1 by default: position embeddings that start as sines and cosines
            (`karat.models.positions`); and attn_init="mimetic", "impulse" or "matched": how queries, keys, values and
            projections start (`karat.models.starts`).

    Raises:
        ValueError: a name that timm doesn't know, images that patches don't divide, or what `karat.karatize` refuses.
            ModelArgumentsError, a kind of it: arguments that the model doesn't take or that contradict each other. With
            pretrained=True what timm raises is handed on, for there it may also be the network's fault.

    >>> model = create_model("vit_tiny_patch16_224", "g3b", img_size=32, patch_size=4, embed_dim=96, depth=6)
    >>> model.blocks[0].attn.operator.num_tokens
    65
    """
    return _build(name, attention, mlp, timm_kwargs, True)


def rebuild_model(
    name: str, attention: KArAtConfig | str | None = None, mlp: str | None = None, **timm_kwargs: Any
) -> nn.Module:
    """As `create_model`, for weights that were saved: what their patches cut off, they were trained without, and how
    they started is past."""
    return _build(name, attention, mlp, timm_kwargs, False)


def _build(
    name: str, attention: KArAtConfig | str | None, mlp: str | None, timm_kwargs: dict[str, Any], fresh: bool
) -> nn.Module:
    """fresh: whether the weights that are drawn will be trained."""
    config = None if attention is None else KArAtConfig.parse(attention)
    if "(" in name:
        name, settings = parse_call(name)
        if fresh:  # a model that was saved so was built with the arguments
            check_said_once(settings, timm_kwargs if attention is None else {"attention": attention} | timm_kwargs)
        timm_kwargs = settings | timm_kwargs
    start = _take_start(timm_kwargs)
    bare = name.split(".")[0]
    if start.attention is not None and bare.startswith(PREFIX):  # a start comes before the operators
        bare = name = bare.removeprefix(PREFIX)
        config = config or KArAtConfig.parse(REGISTERED[bare])
    if ":" not in name and not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists the names"
        raise ValueError(f"unknown model {name!r}; {hint}")
    if bare == DEEP_KAN and (config is None or config.leaves_attention):
        config = None  # it has no attention to convert
    if start.attention is not None and config is not None and config.is_fixed and not config.has_operator:
        raise ValueError(
            f"attn_init={start.attention} starts one map a head, and attention={config} has two: leave it out"
        )
    if bare.startswith(PREFIX) and config is not None:
        timm_kwargs, config = timm_kwargs | {"attention": str(config)}, None

    side = timm_kwargs.get("img_size")
    size = (side, side) if isinstance(side, int) else side

    def finish(model: nn.Module) -> nn.Module:
        example = None if size is None else example_of(model, size)  # not every model keeps what it was given
        if start.positions is not None:
            start_as_sincos(model, start.positions)
        if start.attention is not None and fresh:
            start_attention(model, start.attention)
        if mlp is not None:
            replace_mlp(model, mlp, take_over=bool(timm_kwargs.get("pretrained")))
        if config is not None:
            karatize(model, config, example)
        if fresh:
            check_patches(model)
        return model

    try:
        return _from_timm(name, finish, timm_kwargs)
    except ModelArgumentsError as error:
        if size is None or config is None or "unexpected keyword argument 'img_size'" not in str(error):
            raise
    # It takes images of any size: that isn't the model's, but an example's.
    rest = {key: value for key, value in timm_kwargs.items() if key != "img_size"}
    return _from_timm(name, finish, rest)


def check_said_once(named: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise ValueError where the model's name sets what its arguments set otherwise."""
    for key in named.keys() & given.keys():
        one, other = (KArAtConfig.parse(x[key]) if key == "attention" else x[key] for x in (named, given))
        if one != other:
            raise ValueError(
                f"{key}={named[key]} in the model's name and {key}={given[key]} beside it differ: give one of them"
            )


class _Start(NamedTuple):
    """How a model's own weights start: strength of sines and cosines, and `attn_init`; None: timm's way."""

    positions: float | None
    attention: str | None


def _take_start(arguments: dict[str, Any]) -> _Start:
    """The arguments that are ours, taken out. Raises ValueError for those that can't be, or can't be together."""
    sincos = arguments.get("pos_embed") == SINCOS
    if sincos:
        del arguments["pos_embed"]
    elif "pos_strength" in arguments:
        raise ValueError("pos_strength is that of sines and cosines: add pos_embed=sincos")
    strength, attention = arguments.pop("pos_strength", 1.0), arguments.pop("attn_init", None)
    if attention is not None:
        check_start(attention)
    for name, undone in (("pos_embed=sincos", sincos), (f"attn_init={attention}", attention is not None)):
        if undone and (arguments.get("pretrained") or arguments.get("checkpoint_path")):
            raise ValueError(f"{name} would undo weights that are loaded: leave one out")
    return _Start(strength if sincos else None, attention)


def _from_timm(name: str, finish: Finish, kwargs: dict[str, Any]) -> nn.Module:
    """`create_finished`; ModelArgumentsError where timm refuses the arguments with another kind of error."""
    try:
        with warnings.catch_warnings():  # of no patches `check_patches` speaks
            warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
            return create_finished(name, finish, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, TypeError, RuntimeError) as error:
        if kwargs.get("pretrained"):
            raise
        given = ", ".join(f"{key}={value}" for key, value in kwargs.items())
        raise ModelArgumentsError(
            f"{name} can't be built with {given or 'these settings'}: {first_line(error)}"
        ) from error


def _entry_point(base: str, default: str) -> Callable[..., nn.Module]:
    name = PREFIX + base

    def build(pretrained: bool = False, attention: KArAtConfig | str = default, **kwargs: Any) -> nn.Module:
        config = KArAtConfig.parse(attention)
        saved = pretrained and _is_saved(kwargs.get("pretrained_cfg"))

        def finish(model: Any) -> nn.Module:
            karatize(model, config)
            if saved:
                load_pretrained(model, num_classes=model.num_classes, in_chans=kwargs.get("in_chans", 3))
            return model

        made: Any = create_finished(base, finish, pretrained=pretrained and not saved, **kwargs)
        made.pretrained_cfg["architecture"] = name  # what timm saves, to be built again
        return made

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"timm's {base} with learnable attention, {default} by default."
    return build


def _is_saved(cfg: Any) -> bool:
    """Whether timm was given a folder or repository by which a registered name has its whole converted model."""
    return isinstance(cfg, dict) and cfg.get("source") in ("local-dir", "hf-hub")


def _pretrained_cfgs(base: str) -> dict[str, Any]:
    """What timm knows of a model's weights and inputs, by the names that are karat's; its default stays the default."""
    usual = timm.models.get_pretrained_cfg(base)
    known = timm.models.get_arch_pretrained_cfgs(base)
    return {f"{PREFIX}{name}{'*' if cfg.tag and cfg == usual else ''}": cfg for name, cfg in known.items()}


__all__ = ["create_model"]

# Here timm's register_model looks for what get_pretrained_cfg and resolve_data_config answer.
default_cfgs = timm.models.generate_default_cfgs(
    {name: cfg for base in REGISTERED for name, cfg in _pretrained_cfgs(base).items()}
)

for _base, _default in REGISTERED.items():
    globals()[PREFIX + _base] = timm.models.register_model(_entry_point(_base, _default))
register_peers()
