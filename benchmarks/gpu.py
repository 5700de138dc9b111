"""All that has to be shown on a GPU, in one go: correctness, speed against FlashAttention, memory, long sequences.

    python benchmarks/gpu.py                  # JSON, tables and figures in docs/results/performance/gpu
    python benchmarks/gpu.py --sweep          # tile sizes of the Triton kernels as well
    python benchmarks/gpu.py --study ../shared/data/cifar10    # then ViTs at 224² on CIFAR-10, by the paper's recipe
    python benchmarks/gpu.py --dry            # no GPU: the same steps at toy sizes on the CPU, to try the script itself

A machine that is lent for a while often has torch and no network. What it lacks then (tyro, faster-coco-eval, entmax,
datasets and the like) is collected on one that has it, for the lender's Python, and installed there:

    pip download -c constraints.txt --only-binary :all: --python-version 3.11 -d wheels \\
        tyro rich jinja2 timm accelerate datasets safetensors huggingface_hub matplotlib tensorboard scikit-learn \\
        psutil filelock faster-coco-eval entmax pytest
    make wheel && cp dist/*x86_64.whl wheels
    pip install --no-index --find-links wheels karat entmax pytest    # there; torch stays what it is

It's restartable: a step that is complete in gpu.json, on the same chip with the same versions, isn't run again. After
nine minutes (--minutes) a call ends, a training run saved where it is, with status 2: call it again until that changes.
Keep the output folder between calls: the study's runs lie in it.
Every check is a line of gpu.json: what was measured, its target, whether it's met. Without a CUDA GPU nothing is
measured, which it says, ending with status 1. A failing check doesn't stop the others; the status is then 1 too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro

from karat import KArAtConfig, KArAtOperator, basis_attention
from karat.basis import parse_basis
from karat.study.bench import attention, memory, paper_way, step
from karat.study.bench.attention import AttentionShape
from karat.study.bench.commands import Op, Scaling, Throughput
from karat.study.bench.measurement import Measurement
from karat.study.bench.timing import alternate, environment

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """How large the checks are."""

    batch: int
    heads: int
    tokens: int
    head: int
    longest: int
    step_batch: int
    models: dict[str, dict[str, Any]]
    """timm arguments of the models of a training step"""


FULL = Sizes(128, 12, 197, 64, 3137, 256, {"base": {}, "tiny": {}, "tiny-residual": {}})
TOY_MODEL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
TOY = Sizes(2, 3, 33, 16, 99, 2, {"base": TOY_MODEL, "tiny": TOY_MODEL, "tiny-residual": TOY_MODEL})

# The targets: attention forward+backward in bfloat16 against the flash path, whole steps under autocast
# against SDPA, memory against SDPA and the paper's way, errors against float64.
ATTENTION = {"g1b": 1.0, "g3b": 1.3, "g3b,residual=softmax": 1.6}
STEP = {"base": 1.0, "tiny": 1.1, "tiny-residual": 1.15}
MEMORY = {"softmax SDPA": 1.0, "paper's way": 0.4}
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MEGABYTES = 16  # of JSON
SWEPT = {"queries": (32, 64, 128), "keys": (16, 32, 64), "warps": (4, 8), "stages": (2, 3)}


def check(name: str, value: float | None, target: float | None, note: str = "") -> dict[str, Any]:
    """A line of the report; the value must be at most the target."""
    met = None if value is None or target is None else value <= target
    return {"check": name, "value": value, "target": target, "met": met, "note": note}


@dataclass(frozen=True)
class Gpu:
    """Options."""

    dry: bool = False
    """try the script on the CPU at toy sizes"""
    sweep: bool = False
    """time tile sizes of the Triton kernels as well (minutes of compilation)"""
    rounds: int = 31
    """counted rounds; the median is quoted"""
    study: str | None = None
    """train on these data too, as karat train's --data has it"""
    epochs: int = 5
    """of each run of the study, the same for all"""
    minutes: float = 9.0
    """after which a call ends, to be called again"""
    began: tyro.conf.Suppress[float] = field(default_factory=time.monotonic)
    output: Path = field(default=ROOT / "docs" / "results" / "performance" / "gpu")
    """folder of the results"""

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def sizes(self) -> Sizes:
        return TOY if self.dry else FULL

    def run(self) -> int:
        """Do every step, print and keep the report; the exit status."""
        steps: list[Callable[[], Iterator[dict[str, Any]]]] = [
            self.tests, self.accuracy, self.attention, self.graphs, self.steps, self.memory, self.long, self.tables,
        ]  # fmt: skip
        if self.sweep:
            steps.append(self.tiles)
        if self.study is not None:
            steps.append(self.training)
        done = self.done()
        for one in steps:
            name = one.__name__
            if name in done:
                print(f"== {name}: kept", flush=True)
                continue
            if self.left <= 0:
                print(f"{self.minutes:g} minutes are over: call again for {name} and what follows", flush=True)
                return 2
            print(f"== {name}", flush=True)
            lines: list[dict[str, Any]] = []
            try:
                for line in one():
                    print(json.dumps(line), flush=True)
                    lines.append(line)
            except Exception as error:  # a GPU is lent for a while: what else can be measured, is
                traceback.print_exc()
                lines.append(check(name, None, None, f"failed: {error}") | {"met": False, "failed": True})
            done[name] = lines
            self.write(done)
        checks = [line for lines in done.values() for line in lines]
        size = sum(path.stat().st_size for path in self.output.glob("*.json")) / 1e6
        checks.append(check("JSON of all results, MB", size, MEGABYTES))
        Measurement("GPU checks" + " (dry run on the CPU: figures mean nothing)" * self.dry, checks).show()
        if any(line.get("unfinished") for line in checks):
            print("Runs of the study wait: call again.", flush=True)
            return 2
        return int(any(line["met"] is False for line in checks) and not self.dry)

    @property
    def left(self) -> float:
        """Seconds of this call."""
        return self.began + 60 * self.minutes - time.monotonic()

    @property
    def environment(self) -> dict[str, Any]:
        """Chip, versions, and what else a figure depends on."""
        return environment() | {"triton": _triton(), "dry": self.dry, "rounds": self.rounds}

    def done(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of each step that an earlier call completed in this environment."""
        path = self.output / "gpu.json"
        report = json.loads(path.read_text()) if path.is_file() else {}
        steps = report.get("steps", {}) if report.get("environment") == self.environment else {}
        again = {"failed", "unfinished"}
        return {name: lines for name, lines in steps.items() if not any(again & line.keys() for line in lines)}

    def write(self, steps: dict[str, list[dict[str, Any]]]) -> None:
        """Keep what there is so far."""
        self.output.mkdir(parents=True, exist_ok=True)
        half = self.output / "gpu.json.part"
        half.write_text(json.dumps({"environment": self.environment, "steps": steps}, indent=1) + "\n")
        half.replace(self.output / "gpu.json")

    def tests(self) -> Iterator[dict[str, Any]]:
        """The kernels' tests, compiled where there is a GPU."""
        files = ["test_triton_functions.py"]
        files += [] if self.dry else ["test_triton.py", "test_triton_joint.py"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"tests/ops/{file}" for file in files]
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        last = (child.stdout.strip() or child.stderr.strip() or "no output").splitlines()[-1]
        yield check("kernel tests: exit status", child.returncode, 0, last)

    def accuracy(self) -> Iterator[dict[str, Any]]:
        """Outputs and gradients against float64 on the same numbers, and twice the same bits."""
        B, H, N, D = min(4, self.sizes.batch), 3, self.sizes.tokens, self.sizes.head
        for dtype, target in ERRORS.items():
            for spec in ("fourier(grid=1)", "fourier(grid=3)", "silu+bspline"):
                basis = parse_basis(spec)
                shapes = ((B, H, N, D), (B, H, N, D), (H, basis.num_parameters, N, 12), (B, H, N, 12))
                inputs = [torch.randn(shape, device=self.device).to(dtype) for shape in shapes]

                run = partial(_out_and_gradients, inputs, spec)
                exact = run("reference", torch.float64)
                first, second = run(self.impl, dtype), run(self.impl, dtype)
                worst = max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(first, exact, strict=True))
                same = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
                name = f"{spec}, {str(dtype).removeprefix('torch.')}"
                yield check(f"largest relative error of {name}", worst, target)
                yield check(f"runs that differ in a bit, {name}", int(not same), 0)

    @property
    def impl(self) -> str:
        return "auto" if self.dry else "triton"

    def attention(self) -> Iterator[dict[str, Any]]:
        """Attention alone, forward and backward, against the flash path."""
        shape = AttentionShape(self.sizes.batch, self.sizes.heads, self.sizes.tokens, self.sizes.head)
        for name, target in ATTENTION.items():
            timings = attention.measure(
                shape, name, rounds=self.rounds, device=self.device, dtype=torch.bfloat16, materialised=False
            )
            softmax = timings["softmax SDPA" if self.dry else "softmax flash"].median
            ours = timings["karat tiled" if self.dry else "karat triton"].median
            note = f"{1e3 * ours:.3f} ms against {1e3 * softmax:.3f} ms"
            yield check(f"attention forward+backward, bfloat16, {name}, {shape}: × flash", ours / softmax, target, note)

    def graphs(self) -> Iterator[dict[str, Any]]:
        """The same replayed as CUDA graphs: without Python and dispatch, whose share is in the figures above."""
        shape = (self.sizes.batch, self.sizes.heads, self.sizes.tokens, self.sizes.head)
        q, k, v, grad = torch.randn(4, *shape, device=self.device, dtype=torch.bfloat16).unbind()
        for x in (q, k, v):
            x.requires_grad_()
        for name, target in ATTENTION.items():
            op = KArAtOperator(shape[1], shape[2], f"{name},impl={self.impl}").to(self.device, torch.bfloat16)
            flash = torch.nn.functional.scaled_dot_product_attention if self.dry else attention.flash_softmax
            ways = {"flash": flash, "ours": op.attend}
            runs = {way: self.captured(partial(_gradients, attend, q, k, v, grad)) for way, attend in ways.items()}
            timings = alternate(runs, self.rounds)
            ours, softmax = timings["ours"].median, timings["flash"].median
            note = f"{1e3 * ours:.3f} ms against {1e3 * softmax:.3f} ms"
            yield check(f"the same as CUDA graphs, {name}: × flash", ours / softmax, target, note)

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """A call that replays `run` as a CUDA graph; on the CPU, which has none, `run` itself."""
        if self.dry:
            return run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def steps(self) -> Iterator[dict[str, Any]]:
        """Training steps under bfloat16 autocast against SDPA."""
        for size, target in STEP.items():
            name, short = step.PAIRS[size]
            timings = step.measure(
                name, short, batch=self.sizes.step_batch, rounds=max(3, self.rounds // 3), device=self.device,
                amp=torch.bfloat16, model_options=self.sizes.models[size],
            )  # fmt: skip
            softmax, ours = timings["softmax SDPA"].median, timings["karat"].median
            note = f"{1e3 * ours:.1f} ms against {1e3 * softmax:.1f} ms, batch {self.sizes.step_batch}"
            yield check(f"training step, bfloat16 autocast, {size}+{short}: × SDPA", ours / softmax, target, note)

    def memory(self) -> Iterator[dict[str, Any]]:
        """Peak memory of those steps against SDPA and the paper's way."""
        for size in STEP:
            name, short = step.PAIRS[size]
            peaks: dict[str, float | str] = {}
            ways = [way for way in MEMORY if way != "paper's way" or not paper_way.missing(KArAtConfig.parse(short))]
            for way in ("karat", *ways):
                try:
                    peak = memory.measure(
                        name, short, way, batch=self.sizes.step_batch, device=self.device,
                        model_options=self.sizes.models[size],
                    )  # fmt: skip
                    peaks[way] = peak.step
                except RuntimeError as error:  # the paper's way may not fit at all
                    peaks[way] = str(error)
            ours = peaks["karat"]
            for way in ways:
                target, theirs = MEMORY[way], peaks[way]
                title = f"peak memory of a step, {size}+{short}, batch {self.sizes.step_batch}: × {way}"
                if isinstance(ours, str) or isinstance(theirs, str):
                    yield check(title, None, target, f"karat: {ours}; {way}: {theirs}")
                else:
                    yield check(title, ours / theirs, target, f"{ours:,.0f} MiB against {theirs:,.0f} MiB")

    def long(self) -> Iterator[dict[str, Any]]:
        """As many tokens as an image of 896² has: forward and backward run and are finite."""
        N = self.sizes.longest
        for name in ATTENTION:
            op = KArAtOperator(3, N, f"{name},impl={self.impl}").to(self.device, torch.bfloat16)
            q, k, v = torch.randn(3, 2, 3, N, self.sizes.head, device=self.device, dtype=torch.bfloat16).unbind()
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = op.attend(*leaves)
            gradients = torch.autograd.grad(out.float().square().sum(), leaves)
            bad = sum(int((~x.isfinite()).sum()) for x in (out, *gradients))
            yield check(f"N={N}, {name}: numbers that aren't finite", bad, 0)

    def tables(self) -> Iterator[dict[str, Any]]:
        """The tables of `karat bench`, with their figures, beside gpu.json."""
        common: dict[str, Any] = {"device": self.device, "rounds": self.rounds, "output": self.output}
        toy = self.dry
        Op(**common, dtype="bfloat16", batch=self.sizes.batch, tokens=self.sizes.tokens, head_dim=self.sizes.head).run()
        Scaling(
            **common, dtype="bfloat16", batch=1 if toy else 8, tokens=(17, 33) if toy else Scaling.tokens,
            grids=(1,) if toy else Scaling.grids, ranks=(2,) if toy else Scaling.ranks,
        ).run()  # fmt: skip
        if not toy:
            Throughput(**common, bf16=True, batch=self.sizes.step_batch).run()
        yield check("tables written", 0, 0, str(self.output.name))

    def training(self) -> Iterator[dict[str, Any]]:
        """Top-1 of ViTs with each attention, trained as long: gpu_study.py, as far as this call's time goes."""
        command = [sys.executable, str(Path(__file__).with_name("gpu_study.py")), "--data", str(self.study)]
        command += ["--minutes", f"{self.left / 60:.2f}", "--epochs", str(self.epochs), "--output", str(self.output)]
        child = subprocess.run(command + ["--dry"] * self.dry, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        for run in json.loads(child.stdout):
            note = f"{run['seconds']:.0f} s an epoch" if run["finished"] else "waits"
            line = check(f"top-1, {run['model']}, {run['attention']}, {self.epochs} epochs", run["top1"], None, note)
            yield line if run["finished"] else line | {"unfinished": True}

    def tiles(self) -> Iterator[dict[str, Any]]:
        """Forward+backward over tile sizes, one kernel changed at a time; a tile that can't be launched says so."""
        if self.dry:
            yield check("tile sizes", None, None, "Triton's tiles aren't used on the CPU")
            return
        from karat.ops.triton.arguments import TILES, Tiles

        shape = (self.sizes.batch, self.sizes.heads, self.sizes.tokens, self.sizes.head)
        q, k, v, grad = torch.randn(4, *shape, device=self.device, dtype=torch.bfloat16).unbind()
        for x in (q, k, v):
            x.requires_grad_()
        table = TILES["half"]
        for name, kernel in product(ATTENTION, ("fwd", "dq", "dkdu")):
            attend = KArAtOperator(shape[1], shape[2], f"{name},impl=triton").to(self.device, torch.bfloat16).attend
            usual = table[kernel]
            try:
                for tile in (usual, *(Tiles(*values) for values in product(*SWEPT.values()))):
                    table[kernel] = tile
                    title = f"{name} {kernel} {tuple(tile)}{' (as shipped)' * (tile == usual)}"
                    try:
                        run = partial(attention.forward_backward, attend, q, k, v, grad)
                        yield check(title, 1e3 * alternate({"ours": run}, 9)["ours"].median, None, "ms")
                    except Exception as error:
                        yield check(title, None, None, f"can't be launched: {str(error).splitlines()[0]}")
            finally:
                table[kernel] = usual


def _gradients(attend: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *leaves, grad = tensors
    return torch.autograd.grad(attend(*leaves), leaves, grad)


def _out_and_gradients(inputs: list[torch.Tensor], spec: str, impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
    *leaves, grad = (x.detach().to(dtype).requires_grad_() for x in inputs)
    out = basis_attention(*leaves, spec, impl=impl)
    return [out, *torch.autograd.grad(out, leaves, grad.detach())]


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def main() -> int:
    """Parse, check for the GPU, run."""
    options = tyro.cli(Gpu, description=__doc__)
    if not options.dry and not torch.cuda.is_available():
        print("No CUDA GPU is here, so nothing was measured. --dry tries the script on the CPU.", file=sys.stderr)
        return 1
    return options.run()


if __name__ == "__main__":
    raise SystemExit(main())
