"""`karat hub` and `karat predict`: options, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from karat.errors import parse
from karat.values import Count, Folder

Weights = Literal["last", "best", "ema"]


@dataclass(frozen=True)
class Hub:
    """Make a folder of a run that others can load: config.json, model.safetensors and a model card; or upload it."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    output: Folder | None = None
    """The folder to write; none: RUN/saved."""
    push: str | None = None
    """Name on the Hugging Face Hub, user/name, to upload the folder to; needs `hf auth login` or $HF_TOKEN."""
    private: bool = False
    """With --push: make a new repository a private one."""
    weights: Weights = "last"
    """Weights of the last epoch, of the epoch with the highest top-1, or averaged ones."""
    overwrite: bool = False
    """Replace a saved model that is in the output folder already."""


@dataclass(frozen=True)
class PredictClasses:
    """Say what is in images: the likeliest classes and their probabilities."""

    model: tyro.conf.Positional[str]
    """A run's folder, a saved model's folder, or a name on the Hugging Face Hub."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files."""
    top: Count = 5
    """Classes to name for each image."""
    weights: Weights = "last"
    """For a run: weights of the last epoch, of the epoch with the highest top-1, or averaged ones."""
    device: str = "cpu"
    """cpu or cuda."""
    json: bool = False
    """Print one JSON object a line, {"image", "classes": [{"name", "probability"}]}, instead of a table."""


def hub(arguments: Sequence[str]) -> None:
    """karat hub."""
    parsed = parse(lambda: tyro.cli(Hub, args=arguments, prog="karat hub"), "karat hub")
    from karat.runs import files, saved
    from karat.share.hub import storage
    from karat.share.hub.runs import from_run

    if saved.is_saved(parsed.run):
        raise ValueError(f"{parsed.run} is a saved model already: give the folder of the run")
    folder = parsed.output or parsed.run / "saved"
    names = (saved.CONFIG, saved.WEIGHTS, saved.CARD)
    taken = [folder / name for name in names if (folder / name).exists()]
    if taken and not (parsed.overwrite and saved.is_saved(folder)):
        raise ValueError(f"{taken[0]} is there already: give another --output, or --overwrite for a saved model")
    model = from_run(parsed.run, parsed.weights)
    if parsed.push is not None:
        model.config.training["repo"] = parsed.push
    model.save_pretrained(folder)
    if taken:
        files.write_text(folder / saved.CARD, model.generate_model_card().content)
    print(f"saved: {folder}")
    if parsed.push is not None:
        storage.push(folder, parsed.push, private=parsed.private)
        print(f"uploaded: {parsed.push}")


def predict(arguments: Sequence[str]) -> None:
    """karat predict."""
    parsed = parse(lambda: tyro.cli(PredictClasses, args=arguments, prog="karat predict"), "karat predict")
    if not parsed.images:
        raise ValueError("no image is given: karat predict MODEL IMAGE...")
    import torch

    from karat.share.hub.predict import guesses, probabilities, read
    from karat.share.hub.runs import open_model

    if parsed.device != "cpu" and not (parsed.device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"--device {parsed.device} is not there; choose cpu{' or cuda' * torch.cuda.is_available()}")
    model = open_model(parsed.model, parsed.weights).to(parsed.device)
    found, refused = {}, []
    for path in parsed.images:
        try:
            found[path] = read(path, model.config)
        except ValueError as error:
            refused.append(str(error))
    rows = probabilities(model, list(found.values()))
    for path, row in zip(found, rows, strict=True):
        named = guesses(row, model.config, parsed.top)
        if parsed.json:
            print(json.dumps({"image": str(path), "classes": [guess._asdict() for guess in named]}))
        else:
            words = ", ".join(f"{guess.name} {100 * guess.probability:.2f} %" for guess in named)
            print(f"{path}: {words}")
    if refused:
        raise ValueError("; ".join(refused))
