"""What another image size does to a trained model: the numbers of docs/results/resampling.md.

    python benchmarks/resample_sizes.py --run RUN --again RUN_OF_ANOTHER_SEED --runs FOLDER

Carries RUN from its size to --side and back and compares logits with the untouched run's; the yardstick is how far a
run of the same settings and another seed lies, and how much of a resampled model's accuracy is lost. At --side itself:
accuracy without any training beside fresh operators in the same model, then one epoch there from either, on a fixed
subset of the training images. Writes OUTPUT.json.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

import karat
from karat import runs
from karat.analyze.loading import Run, open_run
from karat.train.classify import train
from karat.train.measure import evaluate_run

EPOCH = {"epochs": 1, "warmup_epochs": 0, "lr": 1e-3, "min_lr": 1e-6}


@dataclass(frozen=True)
class Options:
    """Carry a run to another size and back."""

    run: Path = Path("runs/cifar10/g3b-s0")
    """A trained run with learnable attention."""
    again: Path = Path("runs/cifar10-s1/g3b-s1")
    """The same settings trained with another seed."""
    side: int = 48
    """The other size in pixels."""
    samples: int = 2000
    """Evaluation images of the comparison of logits."""
    fraction: float = 0.2
    """Share of the training images that the one epoch sees."""
    runs: Path = Path("runs/resampling")
    """Where the fine-tuned runs go."""
    output: Path = Path("docs/results/resampling.json")
    """The numbers."""


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """(B,classes), less each row's mean, which softmax ignores."""
    found = torch.cat([model.eval()(part) for part in images.split(100)])
    return found - found.mean(1, keepdim=True)


def gap(one: Tensor, other: Tensor) -> dict[str, float]:
    """Root mean square difference relative to the logits' own size, and the share of equal answers."""
    return {
        "relative_rms": float((one - other).square().mean().sqrt() / one.square().mean().sqrt()),
        "same_answer": float((one.argmax(1) == other.argmax(1)).float().mean()),
    }


def there_and_back(run: Run, options: Options) -> dict[str, Any]:
    """Logits after side -> --side -> side, and those of another seed."""
    samples = run.samples(options.samples)
    side = samples.images.shape[-1]
    model = run.model()
    mine = logits(model, samples.images)
    same = karat.resample_tokens(copy.deepcopy(model), img_size=side)
    equal = all(torch.equal(value, same.state_dict()[name]) for name, value in model.state_dict().items())
    back = karat.resample_tokens(karat.resample_tokens(copy.deepcopy(model), img_size=options.side), img_size=side)
    returned, other = logits(back, samples.images), logits(open_run(options.again).model(), samples.images)

    def top1(found: Tensor) -> float:
        return 100 * float((found.argmax(1) == samples.labels).float().mean())

    return {
        "side": side,
        "samples": len(mine),
        "same_grid_is_bit_equal": equal,
        "there_and_back": {**gap(mine, returned), "top1": top1(returned)},
        "another_seed": {**gap(mine, other), "top1": top1(other)},
        "top1": top1(mine),
    }


def at_the_other_size(options: Options) -> dict[str, Any]:
    """Accuracy at --side, over all evaluation images: carried and fresh operators, before and after one epoch."""
    settings, _ = runs.read_config(options.run)
    found: dict[str, Any] = {"own_size": evaluate_run(options.run, data=settings.data)["top1"]}
    found["carried"] = evaluate_run(options.run, data=settings.data, img_size=options.side)["top1"]
    for name in ("fresh", "carried_tuned", "fresh_tuned"):
        folder = options.runs / name
        start = options.run if name.startswith("carried") else _without_operators(options.run, options.runs)
        tuned = name.endswith("tuned")
        # an epoch at a rate of nothing leaves the start as it is, and makes a run of it
        epoch = EPOCH if tuned else {**EPOCH, "lr": 1e-12, "min_lr": 0.0, "weight_decay": 0.0}
        if not (folder / "eval.json").is_file():
            train(
                replace(
                    settings,
                    init=str(start),
                    img_size=options.side,
                    output=folder,
                    overwrite=True,
                    resume=None,
                    data_fraction=options.fraction if tuned else 0.003,
                    checkpoints="last",
                    checkpoint_hist=1,
                    track=(),
                    recipe=settings.recipe.override(**epoch),
                )
            )
            evaluate_run(folder, data=settings.data)
            shutil.rmtree(folder / "checkpoints")
        found[name] = json.loads((folder / "eval.json").read_text())["top1"]
    return found


def _without_operators(run: Path, folder: Path) -> Path:
    """The run's weights without its operators, as a file: what starts from it draws them anew."""
    from karat.runs import files

    path = folder / "without-operators.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value for name, value in runs.read_weights(run).items() if "operator" not in name}
    files.write_tensors(path, weights)
    return path


def main() -> None:
    """Measure and write."""
    options = tyro.cli(Options, description=__doc__)
    result = {"epoch": EPOCH, "fraction": options.fraction, "to": options.side}
    result |= there_and_back(open_run(options.run), options)
    result["accuracy"] = at_the_other_size(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
