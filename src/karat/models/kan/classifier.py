"""Deep B-spline KANs on flattened images (the paper's Table 14)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from karat.basis.base import check_count
from karat.models.kan.spline import SplineLinear


class KANClassifier(nn.Module):
    """A chain of B-spline KAN layers Q -> h_1 -> … -> classes on flattened inputs (paper, Table 14).

    Args:
        in_features: Q, the number of values of an input, channels · height · width for images.
        hidden: widths of the hidden layers.
        num_classes: outputs.
        grid: G, intervals of each spline's grid.
        order: degree of the splines.
        range: the grids are [-range, range]; a pair (-a, a), as the table prints it, is read too.
        base: base activation beside the splines, "zero" for none.

    >>> import torch
    >>> KANClassifier(64, (10, 10), 10, grid=5)(torch.randn(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (10, 10),
        num_classes: int = 10,
        grid: int = 10,
        order: int = 3,
        range: float | tuple[float, float] = 4.0,
        base: str = "silu",
    ) -> None:
        super().__init__()
        check_count("KANClassifier", "num_classes", num_classes, 1)
        if isinstance(range, tuple):
            if len(range) != 2 or range[0] != -range[1]:
                raise ValueError(f"range must be a number I or (-I, I), got {range!r}")
            range = range[1]
        sizes = [in_features, *hidden, num_classes]
        self.in_features, self.num_classes = in_features, num_classes
        self.grad_checkpointing = False
        self.layers = nn.ModuleList(
            SplineLinear(inputs, outputs, grid=grid, order=order, range=range, base=base)
            for inputs, outputs in pairwise(sizes)
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the layers in the backward pass, as timm's models do."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) with `in_features` values each -> (B, classes). Raises ValueError for another number of values."""
        x = x.flatten(1)
        if x.shape[1] != self.in_features:
            raise ValueError(
                f"this classifier was made for {self.in_features} values an image and got {x.shape[1]}; build it "
                "with the images' size and channels"
            )
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.grad_checkpointing and self.training else layer(x)
        return x
