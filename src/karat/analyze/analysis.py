"""What one look at some runs gives: figures, arrays, numbers and notes, and where they are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import Tensor

from karat.analyze.subject import Subject
from karat.runs.files import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "analysis"  # within a run's
T = TypeVar("T")


@dataclass
class Analysis:
    """The outcome: figures by name, numbers (plain values for JSON), arrays by name, and notes on what is missing."""

    title: str
    figures: dict[str, Figure] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def each(self, subjects: Sequence[Subject], look: Callable[[Subject], T]) -> Iterator[tuple[Subject, T]]:
        """What `look` finds in each of the runs; one for which it raises ValueError is noted and left out.

        Raises ValueError where nothing is found in any.
        """
        refused = 0
        for subject in subjects:
            try:
                found = look(subject)
            except ValueError as error:
                self.notes.append(f"{subject.label}: {error}")
                refused += 1
            else:
                yield subject, found
        if refused == len(subjects):
            raise ValueError("; ".join(self.notes))

    def write(self, folder: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
        """Write figures (in each of `formats`), numbers.json and arrays.npz into a folder; the paths written."""
        from karat.analyze.figures import save

        folder.mkdir(parents=True, exist_ok=True)
        written = [save(figure, folder / f"{name}.{form}") for name, figure in self.figures.items() for form in formats]
        if self.numbers:
            path = folder / "numbers.json"
            write_json(path, as_json(self.numbers))
            written.append(path)
        if self.arrays:
            path = folder / "arrays.npz"
            named: Mapping[str, Any] = {name: array.numpy() for name, array in self.arrays.items()}
            np.savez_compressed(path, **named)
            written.append(path)
        return written


def as_json(value: Any, digits: int | None = None) -> Any:
    """Nested numbers as JSON has them: to `digits` significant ones where given, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {key: as_json(inner, digits) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner, digits) for inner in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


def rounded(found: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Tensors (K,) by name as numbers to be written down."""
    return {name: [round(float(value), 6) for value in values] for name, values in found.items()}
