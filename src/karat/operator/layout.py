"""What the axes of an operator's learned tensors are: made, started and carried to other token grids by this."""

from __future__ import annotations

from typing import NamedTuple


class Axis(NamedTuple):
    """What an axis counts, "tokens", "rank" or "one", and whether what it multiplies is summed over the tokens.

    Amplitudes shrink as such a sum grows.
    """

    counts: str
    summed: bool = False

    @property
    def is_tokens(self) -> bool:
        """Whether each token has its own place along it."""
        return self.counts == "tokens"

    def size(self, num_tokens: int, rank: int | None) -> int:
        """How long it is."""
        return {"tokens": num_tokens, "rank": rank or 0, "one": 1}[self.counts]


TOKENS = Axis("tokens", summed=True)  # keys, whose functions are summed, and outputs, which are weights of values
QUERIES = Axis("tokens")
RANK = Axis("rank")
ALL = Axis("one", summed=True)  # one number for all keys
ONE = Axis("one")

Axes = tuple[Axis, Axis]


class Layout(NamedTuple):
    """The last two axes of an operator's tensors, heads before them."""

    layers: tuple[Axes, ...]  # (inputs, outputs) of the edge layers
    W: Axes | None = None
    C: Axes | None = None  # (queries, outputs)
    sharpness: bool = False  # whether each head has a factor of its scores

    @property
    def maps(self) -> dict[str, Axes]:
        """Those of W and C that there are, by name."""
        return {name: axes for name, axes in (("W", self.W), ("C", self.C)) if axes is not None}

    @property
    def edges_last(self) -> bool:
        """Whether edge functions are, or are part of, what multiplies the values."""
        return bool(self.layers) and self.layers[-1][1] != RANK
