"""Which models are served: the smallest variant of each module of timm.models, and transformers' of small random sizes.

    python benchmarks/served.py [NAME ...]     # all, or these modules; what is in the file already is not run again

Each is converted beside an example, takes steps of AdamW on one batch, and is exported by torch.export. It writes
docs/results/served.json, one row a model, after each model. One thread; a model has three minutes of the processor's
time. Models are cut to few blocks and small images where their constructors allow it.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import karat
from karat.errors import first_line
from karat.models.attach.example import channels
from karat.models.attach.find import find
from karat.models.attach.mode import attached
from karat.models.backbones import attention_sites, backbone_of

OUT = Path(__file__).parent.parent / "docs" / "results" / "served.json"
SECONDS, STEPS = 180, 3
SIZES = (64, 96, 128, 224, 256, 512)  # the smallest that a model takes and that halves the work
DEPTHS: tuple[dict[str, Any], ...] = ({"depth": 2}, {"depths": (2, 2, 2, 2)}, {"depths": (2, 2, 2)}, {})
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {  # class -> its configuration's class, settings
    "ViTModel": ("ViTConfig", IMAGE),
    "DeiTModel": ("DeiTConfig", IMAGE),
    "Dinov2Model": ("Dinov2Config", IMAGE),
    "DINOv3ViTModel": ("DINOv3ViTConfig", {**IMAGE, "hidden_size": 48}),
    "BeitModel": ("BeitConfig", {**IMAGE, "use_relative_position_bias": True}),
    "CLIPVisionModel": ("CLIPVisionConfig", IMAGE),
    "SiglipVisionModel": ("SiglipVisionConfig", IMAGE),
    "ViTMAEModel": ("ViTMAEConfig", IMAGE),
    "SwinModel": ("SwinConfig", {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 2],
                                 "num_heads": [2, 4], "window_size": 4}),
    "BertModel": ("BertConfig", {**SMALL, "vocab_size": 99, "max_position_embeddings": 32}),
}  # fmt: skip

OTHERWISE = {  # attention that forms no scores of queries and keys
    "coat": "its factorised attention is softmax over tokens of the keys alone: no scores",
    "efficientvit_mit": "its linear attention multiplies keys by values first: no scores",
    "swiftformer": "its additive attention sums the queries to one vector: no scores",
}
NOTES = {
    "transformers.BeitModel": "under export transformers adds its mask of ones to the position bias: one on every "
    "score, which only softmax passes over",
}


def modules() -> dict[str, list[str]]:
    """timm's modules, each with its variants from the smallest by name."""
    order = ("zepto", "atto", "femto", "pico", "nano", "test", "xxsmall", "xxs", "xxt", "xtiny", "tiny", "xs", "_t")
    order += ("_s", "small", "medium", "base", "large", "huge", "giant", "gigantic")

    def size(name: str) -> tuple[int, int]:
        bare = name.split(".")[0]
        rank = next((i for i, word in enumerate(order) if re.search(rf"(^|_|\d|l){word}($|_|\d)|{word}", bare)), 8)
        pixels = [int(x) for x in re.findall(r"_(\d{3})(?:$|_)", bare)]
        return rank, pixels[-1] if pixels else 224

    found = {module: sorted(timm.list_models(module=module), key=size) for module in sorted(timm.list_modules())}
    return {module: names for module, names in found.items()
            if names and timm.model_entrypoint(names[0]).__module__.startswith("timm.")}  # fmt: skip


def smallest(module: str, names: list[str]) -> tuple[str, nn.Module]:
    """The variant with the fewest parameters among the first few, built on no device, then for real."""
    counts = {}
    for name in [n for n in names if not n.startswith("karat_")][:4]:
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in timm.create_model(name, num_classes=4).parameters())
    name = min(counts, key=lambda found: counts[found])
    return name, timm.create_model(name, num_classes=4)


def with_input(name: str) -> tuple[nn.Module, Tensor]:
    """The model with the smallest image that it takes, of few blocks if attention is called in them."""
    problem: Exception | None = None
    for depth in DEPTHS:
        for side in SIZES:
            for size, colours in (({"img_size": side}, None), ({}, None), ({}, 3)):
                try:
                    torch.manual_seed(0)
                    model = timm.create_model(name, num_classes=4, **depth, **size)
                    x = torch.randn(2, colours or channels(model), side, side)
                    found = find(model, x)
                except Exception as error:  # another size
                    problem = error
                else:
                    if found or not depth:
                        return model, x
    raise ValueError(f"it takes none of the sizes {SIZES}: {first_line(problem or ValueError())}")


def way(model: nn.Module) -> str:
    """How a converted model was converted."""
    places = [attached(site.module) for site in attention_sites(model)]
    kinds = {"record" if place is None else "softmax" if place.written else "SDPA" for place in places
             if place is None or place.learned}  # fmt: skip
    return ", ".join(sorted(kinds))


def scalar(out: Any) -> Tensor:
    """A loss of whatever a model gives."""
    if isinstance(out, Tensor):
        target = torch.arange(len(out)) % out.shape[-1]
        return F.cross_entropy(out, target) if out.dim() == 2 else out.float().square().mean()
    found = out[0] if isinstance(out, tuple | list) else out.last_hidden_state
    return (found.float() - 1).square().mean() if not isinstance(out, tuple | list) else scalar(found)


def trained(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    """The loss on one batch before and after some steps; in evaluation mode where the model can be trained in it."""
    model.eval()
    try:  # some keep tables between passes in that mode
        for _ in range(2):
            scalar(model(*args, **kwargs)).backward()
    except RuntimeError:
        model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, least = steps(model, args, kwargs, 1e-3)
    if least >= first:
        model.load_state_dict(before)
        first, least = steps(model, args, kwargs, 1e-4)
    return first, least


def steps(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rate: float) -> tuple[float, float]:
    """The loss before some steps, and the least after one of them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(STEPS):
        torch.manual_seed(0)
        loss = scalar(model(*args, **kwargs))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        torch.manual_seed(0)
        losses.append(scalar(model(*args, **kwargs)).item())
    return losses[0], min(losses[1:])


def measure(make: Any) -> dict[str, Any]:
    """One model's row."""
    model, example = make()
    args, kwargs = ((example,), {}) if isinstance(example, Tensor) else ((), example)
    if backbone_of(model) is None and not find(model, example):
        return {"attention": False}
    row: dict[str, Any] = {"attention": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            karat.karatize(model, "g1b,rank=4", example=example)
        except ValueError as error:
            return row | {"converted": "", "reason": str(error)}
    stays = [str(w.message) for w in caught if "stays softmax" in str(w.message)]
    row |= {"converted": way(model), "sites": sum(site.kind.learned for site in attention_sites(model))}
    row |= {"reason": stays[0] if stays else ""}
    try:
        before, after = trained(model, args, kwargs)
        row |= {"loss": [before, after], "trained": after < before}
    except Exception as error:
        row |= {"trained": False, "reason": first_line(error)}
    try:
        program = torch.export.export(model.eval(), args, kwargs)
        with torch.no_grad():
            torch.manual_seed(0)
            theirs = scalar(program.module()(*args, **kwargs))
            torch.manual_seed(0)
            row["exported"] = bool(torch.allclose(theirs, scalar(model(*args, **kwargs)), atol=1e-4))
    except Exception as error:
        row |= {"exported": False, "export_error": first_line(error)[:200]}
    return row


def of_transformers(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model of random weights with an input."""
    import transformers

    kind, settings = TRANSFORMERS[name]
    config = getattr(transformers, kind)(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    if name == "BertModel":
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, 7:] = 0
        return model, {"input_ids": torch.randint(0, 99, (2, 12)), "attention_mask": mask}
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


def stop(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, stop)
    known: dict[str, Any] = json.loads(OUT.read_text(encoding="utf-8"))["rows"] if OUT.exists() else {}
    jobs: dict[str, Any] = {f"transformers.{name}": (lambda name=name: of_transformers(name)) for name in TRANSFORMERS}
    variants = modules()
    jobs |= {f"timm.{module}": (lambda names=names, module=module: with_input(smallest(module, names)[0]))
             for module, names in variants.items()}  # fmt: skip
    wanted = sys.argv[1:]
    for name, make in jobs.items():
        if name.partition(".")[2] not in wanted if wanted else name in known:
            continue
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        bare = name.removeprefix("timm.")
        try:
            known[name] = {"attention": True, "reason": OTHERWISE[bare]} if bare in OTHERWISE else measure(make)
            if name in NOTES and not known[name]["exported"]:
                known[name]["export_error"] = NOTES[name]
        except (Exception, TimeoutError) as error:
            known[name] = {"attention": None, "reason": first_line(error)[:200]}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(name, known[name], flush=True)
        OUT.write_text(json.dumps({"rows": dict(sorted(known.items()))}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
