"""What is measured of each trained model besides its accuracy: how sharp its minimum is, how good its maps are.

The same images for every run of a study, weights of the last epoch, float32; kept in RUN/analysis/measures.json.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scipy.sparse.linalg import ArpackNoConvergence
from torch import Tensor, nn

from karat import runs
from karat.analyze import quality
from karat.analyze.analysis import FOLDER
from karat.analyze.attention import attention_of, grid_of
from karat.analyze.deletion import faithfulness, flow_maps
from karat.analyze.directions import random_directions
from karat.analyze.hessian import Hessian, loss_closure, top_eigenvalues, twice_differentiable
from karat.analyze.landscape import evaluate, moved
from karat.analyze.loading import open_run
from karat.models.evaluating import evaluating
from karat.runs.checkpoint import MODEL
from karat.runs.files import read_json, write_json

MEASURES = "measures.json"
# The numbers that the table shows, with their headings there; all of them are in study.json.
HEADINGS = {
    "largest_eigenvalue": "curvature",
    "loss_rise": "loss rise",
    "map_faithfulness": "map faithfulness",
    "map_entropy": "map entropy",
}
_OF_SIGMA: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": quality.entropy,
    "negative_mass": quality.negative_mass,
    "head_diversity": quality.head_diversity,
}
PART = 32  # images whose attention is held at once
Numbers = dict[str, float | None]


HESSIAN_IMAGES, LOSS_IMAGES, MAP_IMAGES = 32, 256, 256
RADIUS, PLANES = 0.1, 2  # of the loss rise, in lengths of the filters; and how many random planes


def measure_run(folder: Path) -> Numbers:
    """The numbers of a finished run, which its folder keeps; None where one has none.

    largest_eigenvalue: of the Hessian of the training loss (cross-entropy). loss_rise: by how much that loss rises, on
    average, at `radius` along filter-normalised random directions, both ways. map_*: on evaluation images: faithfulness
    of what reaches the class token (`karat.analyze.deletion`); entropy, negative mass and diversity of heads of σ,
    means over blocks and heads (`karat.analyze.quality`).
    """
    run = open_run(folder)
    model = run.model("last")
    seen = run.samples(LOSS_IMAGES, "train")
    few = slice(HESSIAN_IMAGES)
    found: Numbers = {
        "largest_eigenvalue": largest_eigenvalue(model, seen.images[few], seen.labels[few]),
        "loss_rise": loss_rise(model, seen.images, seen.labels, radius=RADIUS, planes=PLANES),
        **_map_numbers(model, run.samples(MAP_IMAGES, "eval").images),
    }
    found = {name: value if value is None or math.isfinite(value) else None for name, value in found.items()}
    (folder / FOLDER).mkdir(exist_ok=True)
    write_json(folder / FOLDER / MEASURES, {"key": _key(folder), "numbers": found})
    return found


def read_measures(folder: Path) -> Numbers | None:
    """The numbers that a run's folder holds of its present weights and these amounts; None where it doesn't."""
    path = folder / FOLDER / MEASURES
    if not path.is_file() or not (folder / runs.DIGESTS).is_file():
        return None
    kept = read_json(path)
    return kept["numbers"] if kept["key"] == _key(folder) and HEADINGS.keys() <= kept["numbers"].keys() else None


def _key(folder: Path) -> dict[str, Any]:
    """What the numbers depend on."""
    amounts = {"hessian_images": HESSIAN_IMAGES, "loss_images": LOSS_IMAGES, "map_images": MAP_IMAGES}
    return {"weights": read_json(folder / runs.DIGESTS)[MODEL][0], **amounts, "radius": RADIUS, "planes": PLANES}


def largest_eigenvalue(model: nn.Module, images: Tensor, labels: Tensor) -> float | None:
    """The largest eigenvalue of the loss's Hessian by all trained parameters, in evaluation mode.

    None where Lanczos' iteration doesn't settle.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with evaluating(model), twice_differentiable(model):
            hessian = Hessian(loss_closure(model, images, labels), parameters)
            return float(top_eigenvalues(hessian, 1, tolerance=1e-2, which="LA"))
    except ArpackNoConvergence:
        return None


def loss_rise(model: nn.Module, images: Tensor, labels: Tensor, *, radius: float = 0.1, planes: int = 2) -> float:
    """The mean of L(θ ± radius·d) - L(θ) over filter-normalised random directions d, two a plane (Li et al. 2018)."""
    base = evaluate(model, images, labels)[0]
    rises = []
    for seed in range(planes):
        for direction in random_directions(model, seed=seed):
            with moved(model, [direction]) as put:
                for sign in (radius, -radius):
                    put([sign])
                    rises.append(evaluate(model, images, labels)[0] - base)
    return statistics.fmean(rises)


def _map_numbers(model: nn.Module, images: Tensor) -> Numbers:
    """Numbers of the maps; None for those that a model without attention or, for faithfulness, patches doesn't have."""
    values: dict[str, list[float]] = {f"map_{name}": [] for name in ("faithfulness", *_OF_SIGMA)}
    for part in images.split(PART):
        try:
            blocks = attention_of(model, part)
        except ValueError:
            break
        for name in _OF_SIGMA:
            of_blocks = [float(_OF_SIGMA[name](block.sigma).mean()) for block in blocks]
            values[f"map_{name}"] += [statistics.fmean(of_blocks)] * len(part)
        try:
            maps = flow_maps(blocks, grid_of(model))
        except ValueError:  # windows, or no patches
            continue
        values["map_faithfulness"] += faithfulness(model, part, maps).tolist()
    return {name: statistics.fmean(found) if found else None for name, found in values.items()}
