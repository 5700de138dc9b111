"""Attention maps beside their images, the regions they pick, scores and σ as matrices, their singular values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from karat.analyze.attention import upsample
from karat.analyze.spectrum import Spectrum
from karat.plots import COLOURS, DIVERGING, SEQUENTIAL, bare, drawing, finish, line_style

SCALE = "each map on its own scale: dark 0, yellow its largest value; with negative values white 0, purple below"
# Values below this share of the largest one are rounding: they would stretch the axis.
FLOOR = 1e-8
MOST_CELLS = 512  # of a matrix's side among many


def draw_maps(pixels: Tensor, maps: Mapping[str, Tensor], *, titles: Sequence[str] = ()) -> Figure:
    """Each image in a row: the image, then one map a column.

    pixels (B,height,width,3) in [0,1]; maps by column title, (B,h,w) each. A map without negative values runs from 0
    to its own maximum; one with them is drawn on a scale that is symmetric around 0.
    """
    B = len(pixels)
    with drawing(1.25 * (len(maps) + 1), 1.3 * B + 0.2, rows=B, columns=len(maps) + 1) as (figure, axes):
        for row in range(B):
            _image(axes[row, 0], pixels, row, titles)
            for column, (name, found) in enumerate(maps.items(), start=1):
                _map(axes[row, column], found[row])
                bare(axes[row, column], name if row == 0 else "")
        figure.supxlabel(SCALE, fontsize=7.5)
    return figure


def _image(axes: Axes, pixels: Tensor, row: int, titles: Sequence[str]) -> None:
    axes.imshow(pixels[row].numpy(), interpolation="nearest")
    bare(axes, "image" if row == 0 else "")
    if titles:
        axes.set_ylabel(titles[row], fontsize=7.5)


def _map(axes: Axes, values: Tensor) -> None:
    low, high = float(values.min()), float(values.max())
    if low < 0:
        reach = max(-low, high)
        axes.imshow(values.numpy(), cmap=DIVERGING, vmin=-reach, vmax=reach)
    else:
        axes.imshow(values.numpy(), cmap=SEQUENTIAL, vmin=0, vmax=max(high, 1e-12))


def draw_regions(
    pixels: Tensor,
    maps: Mapping[str, Tensor],
    regions: Mapping[str, Tensor],
    *,
    titles: Sequence[str] = (),
    captions: Mapping[str, Sequence[str]] | None = None,
    maps_too: bool = False,
    scale: float = 1.0,
) -> Figure:
    """Each image with what attention picks: the map laid over it, the rest dimmed, the region outlined.

    pixels (B,height,width,3); maps (B,h,w) and regions, boolean (B,h,w), by column title; a caption below each picture
    where given. With `maps_too` each map stands on its own below that.
    """
    B, size, lines = len(pixels), (pixels.shape[1], pixels.shape[2]), 1 + maps_too
    with drawing(
        1.5 * scale * (len(maps) + 1), (1.55 * B * lines + 0.2) * scale, rows=B * lines, columns=len(maps) + 1
    ) as (figure, axes):
        for row in range(B):
            upper, lower = axes[row * lines], axes[row * lines + lines - 1]
            _image(upper[0], pixels, row, titles)
            if maps_too:
                lower[0].set_axis_off()
            for column, name in enumerate(maps, start=1):
                shade = upsample(maps[name][row].float(), size).clamp_min(0)
                shade = shade / shade.max().clamp_min(1e-12)
                upper[column].imshow((pixels[row] * (0.25 + 0.75 * shade[..., None])).numpy(), interpolation="nearest")
                _outline(upper[column], regions[name][row], size)
                bare(upper[column], name if row == 0 else "")
                if captions:
                    upper[column].set_xlabel(captions[name][row], fontsize=7, labelpad=2)
                if maps_too:
                    _map(lower[column], maps[name][row])
                    bare(lower[column])
    return figure


def _outline(axes: Axes, mask: Tensor, size: tuple[int, int]) -> None:
    """The borders of a region (h,w) of patches, on an image of `size` pixels."""
    dy, dx = size[0] / mask.shape[0], size[1] / mask.shape[1]
    padded = nn.functional.pad(mask.int(), (1, 1, 1, 1))
    across = (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero().tolist()  # borders that run along x
    along = (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero().tolist()
    lines = [[(x * dx - 0.5, y * dy - 0.5), ((x + 1) * dx - 0.5, y * dy - 0.5)] for y, x in across]
    lines += [[(x * dx - 0.5, y * dy - 0.5), (x * dx - 0.5, (y + 1) * dy - 0.5)] for y, x in along]
    axes.add_collection(LineCollection(lines, colors=COLOURS[5], linewidths=1.3, clip_on=False))


def draw_heads(blocks: Mapping[str, Tensor]) -> Figure:
    """σ of every head (columns) in every block (rows): blocks by name, (H,M,N) each.

    Every matrix is on its own scale; colours as in `draw_maps`. Large ones are averaged to `MOST_CELLS` a side, long
    ones drawn no more than twice as long as wide.
    """
    blocks = {name: _small(sigma) for name, sigma in blocks.items()}
    most = max(sigma.shape[0] for sigma in blocks.values())
    M, N = (max(sigma.shape[axis] for sigma in blocks.values()) for axis in (1, 2))
    gap = max(1, N // 20)
    canvas = np.ones((len(blocks) * (M + gap) - gap, most * (N + gap) - gap, 3))
    for row, sigma in enumerate(blocks.values()):
        for head, matrix in enumerate(sigma.numpy()):
            y, x = row * (M + gap), head * (N + gap)
            colours, low, high = _scale(matrix)
            shade = np.clip((matrix - low) / (high - low), 0, 1)
            canvas[y : y + matrix.shape[0], x : x + matrix.shape[1]] = colormaps[colours](shade)[..., :3]
    side, ratio = min(1.1, 9 / most), min(max(M / N, 0.5), 2)
    with drawing(side * most + 1, side * len(blocks) * ratio + 0.9) as (figure, panel):
        panel.imshow(canvas, aspect=ratio * N / M)
        bare(panel)
        panel.set_xticks([h * (N + gap) + N / 2 for h in range(most)], [str(h) for h in range(most)])
        panel.set_yticks([row * (M + gap) + M / 2 for row in range(len(blocks))], list(blocks))
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_xlabel("head (in each matrix: key)")
        panel.set_ylabel("block (in each matrix: query)")
    return figure


def _small(sigma: Tensor) -> Tensor:
    """(H,M,N) with M and N of `MOST_CELLS` at most: means of neighbours."""
    M, N = sigma.shape[1:]
    size = (min(M, MOST_CELLS), min(N, MOST_CELLS))
    return sigma if size == (M, N) else F.adaptive_avg_pool2d(sigma, size)


def _scale(array: NDArray[np.float32]) -> tuple[str, float, float]:
    """Colours and their ends: symmetric around 0 with negative values, from 0 without; one outlier doesn't set them."""
    reach = float(np.quantile(np.abs(array), 0.995)) or 1e-12
    return (DIVERGING, -reach, reach) if array.min() < 0 else (SEQUENTIAL, 0.0, reach)


def draw_matrices(scores: Tensor, sigmas: Mapping[str, Tensor], place: str = "") -> Figure:
    """Scores (M,N) of one head, and one matrix (M,N) for each activation of them, each with its own colour bar.

    `place` says which head of which block.
    """
    with drawing(2.5 * (len(sigmas) + 1), 2.4, columns=len(sigmas) + 1) as (figure, axes):
        panels = {"scores A": scores, **sigmas}
        for panel, (name, values) in zip(axes, panels.items(), strict=True):
            colours, low, high = _scale(values.numpy())
            image = panel.imshow(values.numpy(), cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            figure.colorbar(image, ax=panel, shrink=0.8)
            panel.set_title(name)
            panel.set_xlabel("key")
            panel.set_ylabel("query")
        if place:
            figure.suptitle(place, fontsize=8.5)
    return figure


def draw_spectra(panels: Mapping[str, Mapping[str, Spectrum]]) -> Figure:
    """One panel each (e.g. a run): the mean singular value over its index, on a log scale, least to greatest shaded.

    The curves of a panel are named, e.g. "A" and "σ(A)"; a dot marks the scree index.
    """
    with drawing(3.3 * len(panels), 3.2, columns=len(panels), sharey=True) as (figure, axes):
        for panel, (title, curves) in zip(axes, panels.items(), strict=True):
            for index, (name, found) in enumerate(curves.items()):
                place = np.arange(1, len(found.mean) + 1)
                floor = float(found.mean.max()) * FLOOR
                mean, low, high = (np.maximum(part.numpy(), floor) for part in (found.mean, found.low, found.high))
                label = f"{name}: effective rank {found.effective_rank:.1f}, break at {found.scree_index}"
                panel.plot(place, mean, label=label, **line_style(index))
                panel.fill_between(place, low, high, color=line_style(index)["color"], alpha=0.18, linewidth=0)
                at = max(found.scree_index, 1)
                panel.plot(at, mean[at - 1], "o", color=line_style(index)["color"], markersize=4)
            panel.set_yscale("log")
            finish(panel, title, "index", "singular value")
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=7.5)
    return figure
