"""Attention maps beside the images they belong to, the regions they pick, scores and σ as matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor, nn

from karat.analyze.attention import upsample
from karat.analyze.figures.style import COLOURS, DIVERGING, SEQUENTIAL, bare, looks, new_figure


def draw_maps(pixels: Tensor, maps: Mapping[str, Tensor], *, titles: Sequence[str] = ()) -> Figure:
    """Each image in a row: the image, then one map a column.

    pixels (B,height,width,3) in [0,1]; maps by column title, (B,h,w) each. A map without negative values runs from 0
    to its own maximum; one with them is drawn on a scale that is symmetric around 0.
    """
    B = len(pixels)
    with looks():
        figure = new_figure(1.25 * (len(maps) + 1), 1.3 * B + 0.2)
        axes = figure.subplots(B, len(maps) + 1, squeeze=False)
        for row in range(B):
            axes[row, 0].imshow(pixels[row].numpy(), interpolation="nearest")
            bare(axes[row, 0], "image" if row == 0 else "")
            if titles:
                axes[row, 0].set_ylabel(titles[row], fontsize=7.5)
            for column, (name, found) in enumerate(maps.items(), start=1):
                _map(axes[row, column], found[row])
                bare(axes[row, column], name if row == 0 else "")
    return figure


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
    maps_too: bool = False,
    scale: float = 1.0,
) -> Figure:
    """Each image with what attention picks: the map laid over it, the rest dimmed, the region outlined.

    pixels (B,height,width,3); maps (B,h,w) and regions, boolean (B,h,w), by column title. With `maps_too` each map
    stands on its own below that.
    """
    B, size, lines = len(pixels), (pixels.shape[1], pixels.shape[2]), 1 + maps_too
    with looks():
        figure = new_figure(1.5 * scale * (len(maps) + 1), (1.55 * B * lines + 0.2) * scale)
        axes = figure.subplots(B * lines, len(maps) + 1, squeeze=False)
        for row in range(B):
            upper, lower = axes[row * lines], axes[row * lines + lines - 1]
            upper[0].imshow(pixels[row].numpy(), interpolation="nearest")
            bare(upper[0], "image" if row == 0 else "")
            if maps_too:
                lower[0].set_axis_off()
            if titles:
                upper[0].set_ylabel(titles[row], fontsize=7.5)
            for column, name in enumerate(maps, start=1):
                shade = upsample(maps[name][row].float(), size).clamp_min(0)
                shade = shade / shade.max().clamp_min(1e-12)
                upper[column].imshow((pixels[row] * (0.25 + 0.75 * shade[..., None])).numpy(), interpolation="nearest")
                _outline(upper[column], regions[name][row], size)
                bare(upper[column], name if row == 0 else "")
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


def draw_matrices(scores: Tensor, sigmas: Mapping[str, Tensor]) -> Figure:
    """Scores (M,N) of one head, and one matrix (M,N) for each activation of them, each with its own colour bar."""
    with looks():
        figure = new_figure(2.5 * (len(sigmas) + 1), 2.4)
        axes = figure.subplots(1, len(sigmas) + 1, squeeze=False)[0]
        for panel, (name, values) in zip(axes, {"scores A": scores, **sigmas}.items(), strict=True):
            array = values.numpy()
            reach = float(np.quantile(np.abs(array), 0.995)) or 1e-12  # one outlier shouldn't grey out the rest
            signed = array.min() < 0
            colours = {"cmap": DIVERGING, "vmin": -reach} if signed else {"cmap": SEQUENTIAL, "vmin": 0}
            image = panel.imshow(array, vmax=reach, interpolation="nearest", **colours)
            figure.colorbar(image, ax=panel, shrink=0.8)
            panel.set_title(name)
            panel.set_xlabel("key")
            panel.set_ylabel("query")
    return figure
