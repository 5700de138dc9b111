"""The drawings of the documentation, each a function that gives one figure.

python docs/pictures.py  # writes docs/images/{idea,house,science,starts,longer}.svg
"""

from __future__ import annotations

from pathlib import Path

import longer_answer
import science_answer
import starts_answer
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from karat import KArAtOperator
from karat.plots import COLOURS, DIVERGING, GRID, INK, SEQUENTIAL, looks, new_figure, save

DOCS = Path(__file__).parent
KEYS, ROWS = 6, 3  # of the picture: N and R

# The rooms, floor by floor from the bottom, one part of the house a column: (name and number, what it is).
FLOORS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("basis 1", "an edge\nfunction"), ("data 5", "from --data\nto batches"), ("detect 9", "the second\ntask")),
    (("ops 2", "the one heavy\noperation"), ("runs 6", "a run\non disk"), ("paper 10", "the paper\nas data")),
    (("operator 3", "one operator,\nits settings"), ("train 7", "the loop"), ("analyze 11", "what was\nlearned")),
    (("models 4", "operators in\nmodels"), ("share 8", "models that\nleave"), ("study 12", "many runs\ncompared")),
)
COLUMNS = ("the idea", "training it, giving it away", "the science")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 0.8})


def cells(axes: Axes, values: torch.Tensor, x: float, y: float, colours: str, largest: float) -> None:
    """A row of numbers as squares from (x, y) on."""
    low = -largest if colours == DIVERGING else 0.0
    axes.imshow(
        values[None].numpy(), extent=(x, x + len(values), y, y + 1), cmap=colours, vmin=low, vmax=largest, zorder=2
    )


def idea() -> Figure:
    """One row of scores through softmax, and through R·N edge functions and W."""
    torch.manual_seed(4)
    op = KArAtOperator(1, KEYS, f"g3b,rank={ROWS}")
    row = torch.tensor([-1.6, 0.4, 2.1, -0.7, 1.2, -0.2])
    x = torch.linspace(-2.5, 2.5, 60)
    functions = op.edges(x).detach()[:, 0]  # (60,R,N)
    at = op.edges(row).detach()[:, 0]
    sums = torch.stack([at[q, :, q] for q in range(KEYS)]).sum(0)
    sigma = op.projector[0].detach() @ sums
    with looks():
        figure = new_figure(7.4, 2.5)
        axes = figure.subplots()
        axes.text(0, 7.2, "one query's row of scores", fontsize=8)
        cells(axes, row, 0, 6, DIVERGING, 2.5)
        # above: softmax
        arrow(axes, (6.4, 6.5), (17.4, 6.5))
        axes.text(11.9, 6.7, "softmax: one fixed map", ha="center", fontsize=8)
        cells(axes, row.softmax(0), 17.8, 6, SEQUENTIAL, 0.6)
        axes.text(17.8, 7.2, "its row of attention", fontsize=8)
        # below: the operator
        for q in range(KEYS):
            arrow(axes, (q + 0.5, 5.9), (q + 0.5, 4.5), GRID)
            for p in range(ROWS):
                left, bottom = q + 0.06, 3.3 - 1.25 * p
                axes.add_patch(FancyBboxPatch((left, bottom), 0.88, 1.0, "round,pad=0", fc="white", ec=GRID, lw=0.6))
                curve = functions[:, p, q] / functions.abs().max()
                axes.plot(left + 0.44 + 0.36 * x / 2.5, bottom + 0.5 + 0.42 * curve, color=COLOURS[p], lw=0.9, zorder=3)
        for p in range(ROWS):
            y = 3.8 - 1.25 * p
            arrow(axes, (6.2, y), (8.2, y), COLOURS[p])
            axes.text(7.1, y + 0.12, "Σ", ha="center", fontsize=9)
            axes.imshow(
                sums[p : p + 1, None].numpy(), extent=(8.4, 9.4, y - 0.5, y + 0.5), cmap=DIVERGING, vmin=-1.5, vmax=1.5
            )
        axes.text(3, -0.1, "karat: a learned function on every edge", ha="center", fontsize=8)
        axes.text(8.9, -0.1, "R sums", ha="center", fontsize=8)
        arrow(axes, (9.8, 2.6), (12.2, 2.6))
        axes.add_patch(FancyBboxPatch((12.4, 1.6), 2.4, 2.0, "round,pad=0", fc="white", ec=INK, lw=0.8))
        axes.text(13.6, 2.6, "W", ha="center", va="center", fontsize=12)
        axes.text(13.6, 1.1, "learned, N×R", ha="center", va="center", fontsize=8)
        arrow(axes, (15.0, 2.6), (17.4, 2.6))
        cells(axes, sigma, 17.8, 2.1, DIVERGING, float(sigma.abs().max()))
        axes.text(17.8, 1.5, "signed, free, each head its own", fontsize=8)
        axes.set(xlim=(-0.4, 25.5), ylim=(-0.6, 7.8), aspect="equal")
        axes.axis("off")
    return figure


def house() -> Figure:
    """The twelve rooms by floor; an import goes from a greater number to a smaller one."""
    with looks():
        figure = new_figure(7.0, 3.6)
        axes = figure.subplots()
        for level, floor in enumerate(FLOORS):
            for column, (name, what) in enumerate(floor):
                x, y = 3.2 * column, 1.25 * level
                box = FancyBboxPatch((x, y), 2.9, 1.0, "round,pad=0,rounding_size=0.08", fc="white")
                box.set(edgecolor=COLOURS[column], linewidth=1.2)
                axes.add_patch(box)
                axes.text(x + 0.15, y + 0.5, name, va="center", fontsize=9, weight="bold", color=COLOURS[column])
                axes.text(x + 2.75, y + 0.5, what, va="center", ha="right", fontsize=7.5)
        for column, title in enumerate(COLUMNS):
            axes.text(3.2 * column + 1.45, 5.1, title, ha="center", fontsize=8.5)
        axes.add_patch(FancyBboxPatch((0, -0.85), 9.3, 0.6, "round,pad=0,rounding_size=0.08", fc="#F4F4F4", ec=GRID))
        axes.text(4.65, -0.55, "errors.py and plots.py, below all rooms", ha="center", va="center", fontsize=7.5)
        axes.add_patch(FancyBboxPatch((0, 5.45), 9.3, 0.6, "round,pad=0,rounding_size=0.08", fc="#F4F4F4", ec=GRID))
        axes.text(
            4.65, 5.75, "cli.py, above all rooms: finds a command, delegates", ha="center", va="center", fontsize=7.5
        )
        axes.set(xlim=(-0.1, 9.4), ylim=(-1.0, 6.2))
        axes.axis("off")
    return figure


PICTURES = {
    "idea": idea,
    "house": house,
    "science": science_answer.figure,
    "starts": starts_answer.figure,
    "longer": longer_answer.figure,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        print(save(draw(), DOCS / "images" / f"{name}.svg"))
