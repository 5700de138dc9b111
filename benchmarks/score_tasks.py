"""Three tasks whose answers are functions of the scores: does learnable attention learn what softmax can't express?

    OMP_NUM_THREADS=1 python benchmarks/score_tasks.py --processes 2 --figure docs/images/score-tasks.svg
    python benchmarks/score_tasks.py --table

The first trains what isn't trained, writes docs/results/science/score_tasks.json and draws the figure, in a quarter of
an hour on two cores. It may be stopped and started again: a run is a file below --output, claimed by a lock.

A scene has N tokens, each a direction on the sphere and a sign, +1 or -1. Directions are drawn anew for every scene, so
that only their similarity c, the cosine of two, tells anything. Each token is asked for one number:

- count: how many tokens have its direction. The right weight is 1 at c = 1, else 0, summed and not normalised.
- odd one out: all tokens but one share a direction; the sign of the odd one less the sum of the crowd's signs over
  √(N-1), asked of the crowd. The right weight is +1 for c ≤ 1/2 and -1/√(N-1) at c = 1: signed.
- band: the sum of the signs of the tokens with 0 < c < 1/2. The right weight is 1 there, else 0.

A model has one pre-norm block as in a ViT: attention, then an MLP; no positions are told. Every scene is new. Of two
learning rates an attention is given the one that does better on held-out scenes, at the first size and with a seed that
isn't counted; then five seeds are trained at it, at every size, and measured on other scenes. What is measured is the
share of the answers' variance that is explained: 0 for the mean, 1 for the exact answer; of count also the share of
exact answers, when rounded.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from karat import KArAtConfig, KArAtOperator, runs
from karat.runs.files import write_json
from karat.study.work import claimed

RATES, SEEDS, CHOOSER = (3e-3, 1e-2), range(5), 100  # the seed that the rate is chosen with
STEPS, BATCH, MEASURED = 800, 32, 2000  # updates, scenes of each, scenes that are measured
AT_ONCE = 100  # updates whose scenes are drawn at once
KINDS, APART, BAND = 4, 0.5, (0.0, 0.5)  # directions of a scene and their largest cosine; the band of cosines
HELD_OUT, TEST = 10_001, 10_002  # seeds of the scenes that choose, and of those that are measured
BASE = (16, 16)  # N and D
SIZES = (BASE, (16, 32), (32, 16))
LINE = torch.linspace(-1, 1, 41)  # similarities at which learned weights are read


@dataclass(frozen=True)
class Row:
    """An attention; everywhere: also at the sizes that aren't the first."""

    attention: str
    heads: int = 1
    depth: int = 1
    everywhere: bool = False


ROWS = {
    "softmax": Row("softmax", everywhere=True),
    "sigmoid": Row("sigmoid", everywhere=True),
    "softmax, two heads": Row("softmax", heads=2),
    "softmax, two blocks": Row("softmax", depth=2),
    "static, rank 12": Row("static-b"),
    "φ(score), G3": Row("g3b,rank=None,order=Pointwise", everywhere=True),
    "φ(score), G1": Row("g1b,rank=None,order=Pointwise"),
    "operator G3, rank 4": Row("g3b,rank=4"),
    "operator G3, rank 12": Row("g3b", everywhere=True),
    "operator G1, rank 12": Row("g1b"),
    "operator G3, full rank": Row("g3b,rank=None"),
    "operator G3, rank 12, beside softmax": Row("g3b,residual=softmax"),
}


@dataclass(frozen=True)
class Options:
    """Train what isn't trained, write results, table and figure; with --table only print what was written."""

    processes: int = 2
    """How many train at once."""
    output: Path = Path("runs/score-tasks")
    """The folder of the runs."""
    results: Path = Path("docs/results/science/score_tasks.json")
    """Where they are collected."""
    figure: Path | None = None
    """Draw the learned weights beside the right ones."""
    table: bool = False
    """Print the tables of the results, as Markdown; train nothing."""


# -- scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """directions (B,N,3), signs (B,N) of 1 and -1, answers (B,N), and which are asked, boolean (B,N)."""

    directions: Tensor
    signs: Tensor
    answers: Tensor
    asked: Tensor


def kinds(count: int, number: int, generator: torch.Generator) -> Tensor:
    """(count,number,3): directions, uniform but that no two have a cosine above APART."""
    found = torch.empty(0, number, 3)
    while len(found) < count:
        drawn = F.normalize(torch.randn(4 * count, number, 3, generator=generator), dim=-1)
        cosines = drawn @ drawn.mT - 2 * torch.eye(number)
        found = torch.cat([found, drawn[cosines.amax((1, 2)) <= APART]])
    return found[:count]


def signs(B: int, N: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (B, N), generator=generator) * 2.0 - 1


def count(B: int, N: int, generator: torch.Generator) -> Scenes:
    """Directions of KINDS kinds, in shares drawn anew for each scene."""
    share = -torch.rand(B, KINDS, generator=generator).log()
    which = torch.multinomial(share, N, replacement=True, generator=generator)
    directions = kinds(B, KINDS, generator)[torch.arange(B)[:, None], which]
    same = which[:, :, None] == which[:, None, :]
    return Scenes(directions, signs(B, N, generator), same.sum(-1).float(), torch.ones(B, N, dtype=torch.bool))


def odd(B: int, N: int, generator: torch.Generator) -> Scenes:
    """One token, anywhere, of another direction than all others."""
    which = F.one_hot(torch.randint(N, (B,), generator=generator), N)
    directions = kinds(B, 2, generator)[torch.arange(B)[:, None], which]
    values = signs(B, N, generator)
    answer = (values * torch.where(which == 1, 1.0, -1 / math.sqrt(N - 1))).sum(-1, keepdim=True)
    return Scenes(directions, values, answer.expand(B, N), which == 0)


def band(B: int, N: int, generator: torch.Generator) -> Scenes:
    """Directions anywhere: the cosine of two is uniform on the sphere (Archimedes)."""
    directions = F.normalize(torch.randn(B, N, 3, generator=generator), dim=-1)
    values = signs(B, N, generator)
    cosines = directions @ directions.mT
    middling = (cosines > BAND[0]) & (cosines < BAND[1])
    answers = (middling * values[:, None]).sum(-1)
    return Scenes(directions, values, answers, torch.ones(B, N, dtype=torch.bool))


TASKS: dict[str, Callable[[int, int, torch.Generator], Scenes]] = {"count": count, "odd one out": odd, "band": band}


def right_weights(task: str, cosines: Tensor, N: int) -> Tensor:
    """What a key of each similarity should weigh; NaN where no scene has keys like that."""
    if task == "band":
        return ((cosines > BAND[0]) & (cosines < BAND[1])).float()
    same, other = (1.0, 0.0) if task == "count" else (-1 / math.sqrt(N - 1), 1.0)
    never = torch.full_like(cosines, math.nan)
    return torch.where(cosines > 1 - 1e-6, same, torch.where(cosines <= APART, other, never))


# -- the model --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); (B,N,C) -> (B,N,C)."""

    def __init__(self, width: int, row: Row, num_tokens: int) -> None:
        super().__init__()
        self.heads = row.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        config = KArAtConfig.parse(row.attention)
        self.operator = None if config.is_softmax else KArAtOperator(row.heads, num_tokens, config)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, (B,H,N,D) each."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def sigma(self, x: Tensor) -> Tensor:
        """What each key weighs: (B,H,N,N)."""
        q, k, _ = self.parts(x)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.softmax(-1) if self.operator is None else self.operator(scores)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        out = F.scaled_dot_product_attention(q, k, v) if self.operator is None else self.operator.attend(q, k, v)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Directions and signs of N tokens to a number each: (B,N,3), (B,N) -> (B,N)."""

    def __init__(self, row: Row, num_tokens: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList([Block(width, row, num_tokens) for _ in range(row.depth)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def tokens(self, directions: Tensor, values: Tensor) -> Tensor:
        """What the first block sees; each number of a token has a mean square of 1."""
        return self.embed(torch.cat([math.sqrt(3) * directions, values[..., None]], -1))

    def forward(self, directions: Tensor, values: Tensor) -> Tensor:
        x = self.tokens(directions, values)
        for block in self.blocks:
            x = block(x)
        return self.head(x)[..., 0]


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One model to train."""

    task: str
    row: str
    size: tuple[int, int]
    rate: float
    seed: int

    @property
    def name(self) -> str:
        row = re.sub(r"\W+", "-", self.row)
        return f"{self.task.split()[0]}-{self.size[0]}-{self.size[1]}-{row}-lr{self.rate:g}-s{self.seed}"


def train(job: Job) -> dict[str, Any]:
    """Train a model and measure it."""
    row, (N, D), scenes_of = ROWS[job.row], job.size, TASKS[job.task]
    torch.manual_seed(job.seed)
    began, model, generator = time.process_time(), Model(row, N, D * row.heads), torch.Generator().manual_seed(job.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=job.rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, job.rate, total_steps=STEPS, pct_start=0.1)
    known = scenes_of(MEASURED, N, torch.Generator().manual_seed(HELD_OUT))
    mean, deviation = known.answers[known.asked].mean(), known.answers[known.asked].std()
    for step in range(STEPS):
        if step % AT_ONCE == 0:
            scenes = scenes_of(AT_ONCE * BATCH, N, generator)
        part = slice(step % AT_ONCE * BATCH, (step % AT_ONCE + 1) * BATCH)
        found = model(scenes.directions[part], scenes.signs[part])
        loss = (found - (scenes.answers[part] - mean) / deviation)[scenes.asked[part]].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

    @torch.no_grad()
    def measured(scenes: Scenes) -> dict[str, float]:
        errors = (mean + deviation * model(scenes.directions, scenes.signs) - scenes.answers)[scenes.asked]
        explained = 1 - errors.square().mean() / scenes.answers[scenes.asked].var()
        return {"explained": explained.item(), "exact": (errors.abs() < 0.5).float().mean().item()}

    result = {**asdict(job), "held_out": measured(known)["explained"]}
    result |= measured(scenes_of(MEASURED, N, torch.Generator().manual_seed(TEST)))
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if job.size == BASE and row.heads == row.depth == 1:
        result["weights"] = weights(model, job.task, N).tolist()
    return {**result, "cpu_seconds": time.process_time() - began}


@torch.no_grad()
def weights(model: Model, task: str, N: int, count: int = 64) -> Tensor:
    """What a query gives a key, over their similarity (LINE), mean over scenes; of count, over the sum of its row.

    In each scene the second token is put at that similarity to the first, which is the query.
    """
    scenes = TASKS[task](4 * count, N, torch.Generator().manual_seed(TEST))
    usable = scenes.asked[:, :2].all(-1)
    directions, values = scenes.directions[usable][:count], scenes.signs[usable][:count]
    query = directions[:, 0]
    aside = F.normalize(torch.linalg.cross(query, directions.roll(1, 0)[:, 0]), dim=-1)
    found = []
    for c in LINE:
        directions[:, 1] = c * query + (1 - c**2).clamp(min=0).sqrt() * aside
        sigma = model.blocks[0].sigma(model.tokens(directions, values))[:, 0, 0]  # type: ignore[operator]  # a Block
        found.append(sigma.sum(-1).mean() if task == "count" else sigma[:, 1].mean())
    return torch.stack(found)


def cells() -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Task, row and size of everything that is trained."""
    for size, task, (name, row) in product(SIZES, TASKS, ROWS.items()):
        if size == BASE or row.everywhere:
            yield task, name, size


def result_of(job: Job, folder: Path) -> dict[str, Any] | None:
    path = folder / job.name / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def jobs(folder: Path) -> Iterator[Job]:
    """What can be trained by now: of a task and row first the rates, at the first size, then the seeds at all sizes."""
    for cell in cells():
        trials = [Job(*cell[:2], BASE, rate, CHOOSER) for rate in RATES]
        yield from trials if cell[2] == BASE else ()
        found = [result for trial in trials if (result := result_of(trial, folder)) is not None]
        if len(found) == len(trials):
            rate = max(found, key=lambda result: result["held_out"])["rate"]
            yield from (Job(*cell, rate, seed) for seed in SEEDS)


def work(folder: Path) -> None:
    """Train until nothing is left that no other process trains."""
    torch.set_num_threads(1)
    waiting = True
    while waiting:  # for others' runs, on which further ones rest
        waiting = False
        for job in jobs(folder):
            if result_of(job, folder) is not None:
                continue
            with claimed(folder / job.name) as mine:
                if mine and result_of(job, folder) is None:
                    write_json(folder / job.name / "result.json", train(job))
                waiting |= not mine
        time.sleep(0.2 * waiting)


def collect(folder: Path) -> dict[str, Any]:
    """All results with what they rest on."""
    found = [result for job in jobs(folder) if (result := result_of(job, folder)) is not None]
    configuration = {"rates": RATES, "steps": STEPS, "batch": BATCH, "scenes": MEASURED, "seeds": list(SEEDS)}
    configuration |= {"rate_chosen_with_seed": CHOOSER, "held_out": HELD_OUT, "test": TEST, "line": LINE.tolist()}
    rows = {name: asdict(row) for name, row in ROWS.items()}
    machine = {**runs.versions(), "machine": platform.machine()}
    return {"configuration": configuration, "rows": rows, "versions": machine, "runs": found}


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return {name: rounded(one) for name, one in value.items()} if isinstance(value, Mapping) else value


def main() -> None:
    """Train, collect, show."""
    options = tyro.cli(Options, description=__doc__)
    import score_tasks_shown as shown

    if not options.table:
        context = multiprocessing.get_context("spawn")
        others = [context.Process(target=work, args=(options.output,)) for _ in range(options.processes - 1)]
        for process in others:
            process.start()
        work(options.output)
        for process in others:
            process.join()
        found = rounded(collect(options.output))
        lines = ",\n  ".join(json.dumps(run, ensure_ascii=False) for run in found.pop("runs"))
        head = json.dumps(found, indent=1, ensure_ascii=False)[:-2]
        options.results.write_text(f'{head},\n "runs": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    results = json.loads(options.results.read_text(encoding="utf-8"))
    print(shown.tables(results))
    if options.figure is not None:
        shown.draw(results, options.figure)


if __name__ == "__main__":
    main()
