"""The model card of a saved model, written from its configuration and from what its run noted."""

from __future__ import annotations

import copy
from importlib import resources
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from karat.operator.config import KArAtConfig
from karat.runs.saved import OWN_MLP, ModelConfig


def model_card(config: ModelConfig, parameters: int, defaults: ModelCardData) -> ModelCard:
    """README.md: what the model is, how to use it, and, where a run is known, its results, command and versions.

    `config.training` may hold `data`, `weights`, `epoch`, `results` {metric: %}, `images`, `command` and `versions`;
    what it doesn't hold isn't claimed. `defaults` are the card's tags.
    """
    training = config.training
    title = training.get("name") or f"{config.model} with {attention_name(config)}"
    results = {str(name): float(value) for name, value in training.get("results", {}).items()}
    data = copy.deepcopy(defaults)
    if results and training.get("data"):
        data.model_name = title
        data.eval_results = [
            EvalResult("image-classification", str(training["data"]), str(training["data"]), name, round(value, 4))
            for name, value in results.items()
        ]
    height, width = config.sides
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    text = template.from_string(
        resources.files("karat.share.hub").joinpath("card.md").read_text(encoding="utf-8")
    ).render(
        card_data=data.to_yaml().strip(),
        title=title,
        name=training.get("repo", "FOLDER"),
        summary=_summary(config),
        facts=_facts(config, parameters),
        shape=f"({', '.join(map(str, ('B', config.in_chans, height, width)))})",
        mean=_numbers(config.mean),
        std=_numbers(config.std),
        results=[(_METRICS.get(name, name), f"{value:.2f} %") for name, value in results.items()],
        measured_on=_measured_on(training),
        settings=[(k, v) for k, v in training.get("settings", {}).items() if v is not None],
        command=training.get("command", ""),
        versions=", ".join(f"{name} {version}" for name, version in training.get("versions", {}).items()),
        class_names=", ".join(config.class_names),
    )
    return ModelCard(text)


_METRICS = {"top1": "top-1", "top5": "top-5"}


def attention_name(config: ModelConfig) -> str:
    """The attention in words."""
    attention = KArAtConfig.parse(config.attention)
    if attention.leaves_attention or attention.is_fixed:
        return f"{attention} attention"
    return f"learnable attention {attention}"


def _summary(config: ModelConfig) -> str:
    attention = KArAtConfig.parse(config.attention)
    if attention.is_softmax:
        positions = "" if attention.position_bias is None else " and a learned relative position bias"
        what = f"An image classifier with ordinary softmax attention{positions}."
    elif attention.is_fixed:
        what = f"An image classifier with `{attention}` attention in karat's notation, a fixed function of the scores."
    elif attention.residual or not attention.has_edges or attention.order == "Pointwise":
        what = f"An image classifier whose attention is learnable: `{attention}` in karat's notation."
    else:
        rank = "full rank" if attention.rank is None else f"rank {attention.rank}"
        what = (
            "An image classifier whose attention is learnable: in place of softmax each head has an operator of "
            f"{attention.basis} edge functions, {rank}, {attention.sharing}."
        )
    return what if config.mlp == OWN_MLP else f"{what} Its MLPs are KAN layers, `{config.mlp}`."


def _facts(config: ModelConfig, parameters: int) -> list[tuple[str, Any]]:
    height, width = config.sides
    rows: list[tuple[str, Any]] = [
        ("model", f"`{config.model}`"),
        ("attention", f"`{config.attention}`"),
        ("MLP", f"`{config.mlp}`"),
        ("images", f"{height}×{width}, {config.in_chans} channels"),
        ("classes", config.num_classes),
        ("parameters", f"{parameters:,}"),
    ]
    return rows + [(name, f"`{value}`") for name, value in config.model_args.items() if name != "img_size"]


def _measured_on(training: dict[str, Any]) -> str:
    data = f"evaluation images of `{training['data']}`" if training.get("data") else "evaluation images"
    epoch = f", epoch {training['epoch']}" if training.get("epoch") else ""
    return f"On the {data}; {training.get('weights', 'last')} weights{epoch}. One run."


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
