"""The loss around the trained weights, as a surface and as contours with the path that training took."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from karat.analyze.landscape import Surface
from karat.analyze.trajectory import Plane
from karat.plots import COLOURS, SEQUENTIAL, drawing, finish


def _finite(loss: NDArray[np.float64]) -> NDArray[np.float64]:
    """Infinite and undefined points at the height of the largest finite one."""
    known = loss[np.isfinite(loss)]
    return np.nan_to_num(loss, nan=known.max(initial=0), posinf=known.max(initial=0))


def draw_surface(surfaces: Mapping[str, Surface]) -> Figure:
    """Each surface in perspective, all on one scale of the loss."""
    heights = {name: _finite(found.loss.numpy()) for name, found in surfaces.items()}
    low, high = min(h.min() for h in heights.values()), max(h.max() for h in heights.values())
    with drawing(3.6 * len(surfaces), 3.2, columns=len(surfaces), subplot_kw={"projection": "3d"}) as (figure, axes):
        for panel, (name, found) in zip(axes, surfaces.items(), strict=True):
            X, Y = np.meshgrid(found.x.numpy(), found.y.numpy())
            panel.plot_surface(
                X, Y, heights[name], cmap=SEQUENTIAL, vmin=low, vmax=high, rcount=60, ccount=60, linewidth=0.1
            )
            panel.set_zlim(low, high)
            panel.set_box_aspect(None, zoom=0.8)  # room for the labels, which the layout doesn't see
            panel.set_title(name, y=0.95)
            panel.set_xlabel("direction 1")
            panel.set_ylabel("direction 2")
            panel.set_zlabel("loss")
            panel.tick_params(labelsize=6)
    return figure


def draw_contours(surfaces: Mapping[str, Surface], planes: Mapping[str, Plane | None]) -> Figure:
    """Each surface's contours; with a plane the path's checkpoints on it, the filled dot being the end of training.

    The axes' labels give each direction's share of the path's variance.
    """
    with drawing(3.5 * len(surfaces), 3.1, columns=len(surfaces)) as (figure, axes):
        for panel, (name, found) in zip(axes, surfaces.items(), strict=True):
            loss = _finite(found.loss.numpy())
            shades = panel.contourf(found.x.numpy(), found.y.numpy(), loss, levels=20, cmap=SEQUENTIAL)
            panel.contour(found.x.numpy(), found.y.numpy(), loss, levels=20, colors="white", linewidths=0.3)
            figure.colorbar(shades, ax=panel, label="loss")
            x, y = "direction 1", "direction 2"
            plane = planes.get(name)
            if plane is not None:
                path = plane.coordinates.numpy()
                panel.plot(path[:, 0], path[:, 1], "-o", color=COLOURS[1], markersize=3, linewidth=1)
                x, y = (f"direction {i} ({100 * float(plane.explained[i - 1]):.0f} %)" for i in (1, 2))
            panel.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=5)
            finish(panel, name, x, y)
            panel.grid(False)
    return figure
