"""What can go wrong while training, and what is said about it: signals, non-finite numbers, dead workers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from karat.errors import TrainingDiverged as TrainingDiverged
from karat.errors import first_line
from karat.models.evaluating import evaluating
from karat.train.watch import whole


def worker_death(error: Exception) -> str | None:
    """What happened, in one line, if `error` tells of a data worker that died; None for any other error.

    torch raises RuntimeError with the worker's number; a worker that dies while it answers breaks its pipe.
    """
    said = first_line(error)
    if isinstance(error, EOFError | ConnectionError):
        return f"a data worker died ({said})"
    if "DataLoader worker" not in said:
        return None
    return said if "worker died" in said else f"a data worker died ({said})"


def diverged(step: int, bad_steps: int, found: str, folder: Path) -> TrainingDiverged:
    """The error that ends a run at `step` with too many bad updates, with what was found of the last one."""
    return TrainingDiverged(
        f"stopped at step {step}: {bad_steps} updates had a non-finite loss or gradient ({found}). "
        f"The last good state is saved in {folder}: begin again with a lower --lr, --operator-lr-scale or --clip-grad, "
        "or go on with --resume and a higher --max-bad-steps"
    )


class StopRequest:
    """While it is entered, SIGINT and SIGTERM are noted instead of obeyed; a second SIGINT is obeyed at once.

    `received` is the signal's number, or None. Outside the main thread, where python allows no handlers, it stays None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _spread(tensor: Tensor) -> str:
    """The range of a tensor's finite entries, in words."""
    finite = tensor.detach().float()
    finite = finite[torch.isfinite(finite)]
    return f"{finite.min().item():.3g} to {finite.max().item():.3g}" if finite.numel() else "no finite value"


def _first_bad_module(model: nn.Module, run: Callable[[], object]) -> str | None:
    """The name of the first module, in order of execution and innermost, whose output is not finite."""
    found: list[str] = []
    handles = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(watch(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def score_ranges(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """The attention scores of every block whose attention is known, for one forward pass; empty where none is."""
    from karat.models.record import record

    try:
        with record(model) as intermediates:
            run()
            return {name: entry.scores for name, entry in intermediates.items()}
    except ValueError:
        return {}


@torch.no_grad()
def diagnose(model: nn.Module, images: Tensor | list[Tensor], bad_gradients: list[str]) -> str:
    """In one sentence: where numbers stop being finite for this batch, and the range of the attention scores there.

    Every process must call it where parameters are sharded.

    Args:
        model: the bare model; its weights are those before the step that was skipped.
        images: the batch (B, C, height, width), or a list of images, that gave a non-finite loss or gradient.
        bad_gradients: names of the parameters whose gradient was not finite.
    """
    weight = next((name for name, p in model.named_parameters() if not torch.isfinite(whole(p)).all()), None)

    def run() -> object:
        return model(images)

    with evaluating(model):  # whatever this process's batch holds: where parameters are sharded it takes all of them
        bad = _first_bad_module(model, run)
        scores = score_ranges(model, run)
    if not all(torch.isfinite(image).all() for image in images):
        return "the batch itself holds non-finite pixels: look at the data"
    if weight is not None:
        return f"the weight {weight} is not finite"
    if bad is not None:
        place = f"the output of {bad} is the first that is not finite"
        block = next((name for name in scores if bad.startswith(name.rsplit(".", 1)[0] + ".")), None)
    elif bad_gradients:
        # backward runs from the last block to the first: the deepest one named is where it began
        place = f"the forward pass is finite, the gradient is not, beginning at {bad_gradients[-1]}"
        deepest = bad_gradients[-1]
        block = next((name for name in scores if deepest.startswith(name.rsplit(".", 1)[0] + ".")), None)
    else:
        place, block = "every block is finite in evaluation mode: the loss itself is not", None
    if block is None and scores:
        block = max(scores, key=lambda name: scores[name].abs().nan_to_num(posinf=torch.inf).max().item())
    return place if block is None else f"{place}; attention scores in {block}: {_spread(scores[block])}"
