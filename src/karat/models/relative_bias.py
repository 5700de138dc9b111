"""A learnable bias of the scores for each head and offset of two tokens on their grid."""

from __future__ import annotations

import torch
from timm.layers import gen_relative_position_index, resize_rel_pos_bias_table_simple
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """bias_h(k, n) = table_h[y_k − y_n, x_k − x_n], added to the scores (Liu et al., Swin, arXiv 2103.14030, eq. 4).

    Prefix tokens have no place on the grid: each pair with one of them takes one of three numbers a head, for prefix to
    cell, cell to prefix, and prefix to prefix (as BEiT's class token has them). All start at zero, so that a model
    begins as it would without.

    Args:
        num_heads: H.
        grid: (h, w) of the tokens.
        prefix: how many tokens come before them.

    Parameters: `table` (H,2h−1,2w−1), `prefix_table` (H,3) or None.

    >>> RelativeBias(num_heads=2, grid=(3, 4), prefix=1)().shape
    torch.Size([1, 2, 13, 13])
    """

    def __init__(self, num_heads: int, grid: tuple[int, int], prefix: int = 0) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * grid[0] - 1, 2 * grid[1] - 1))
        self.prefix_table = nn.Parameter(torch.zeros(num_heads, 3)) if prefix else None

    def forward(self, grid: tuple[int, int] | None = None) -> Tensor:
        """The bias (1,H,N,N), on another grid (see `resample`) where one is given."""
        grid = self.grid if grid is None else grid
        table = self._on(grid).flatten(1)  # (H, offsets)
        index = gen_relative_position_index(grid, class_token=self.prefix > 0, device=table.device)
        if self.prefix_table is not None:
            table = torch.cat([table, self.prefix_table], dim=1)
            place = (torch.arange(self.prefix + grid[0] * grid[1], device=index.device) - self.prefix + 1).clamp(min=0)
            index = index[place][:, place]  # prefix tokens are alike
        return table[:, index].unsqueeze(0)

    def _on(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.table
        shape = (len(self.table), 2 * grid[0] - 1, 2 * grid[1] - 1)
        table = self.table.to(torch.promote_types(self.table.dtype, torch.float32))
        return resize_rel_pos_bias_table_simple(table, grid, shape).to(self.table.dtype)

    @torch.no_grad()
    def resample(self, grid: tuple[int, int], prefix: int) -> None:
        """Carry the table to another grid, in place, by bicubic interpolation; the same grid leaves it untouched.

        Dropped prefix tokens take their numbers along, added ones to a grid without any start at zero. Parameters
        that change are new objects: build the optimiser afterwards.
        """
        if grid != self.grid:
            self.table = nn.Parameter(self._on(grid), requires_grad=self.table.requires_grad)
        if bool(prefix) != bool(self.prefix):
            added = nn.Parameter(self.table.new_zeros(len(self.table), 3), requires_grad=self.table.requires_grad)
            self.prefix_table = added if prefix else None
        self.grid, self.prefix = grid, prefix

    def extra_repr(self) -> str:
        return f"num_heads={len(self.table)}, grid={self.grid}, prefix={self.prefix}"


def relative_biases(model: nn.Module) -> dict[str, RelativeBias]:
    """The relative position biases of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RelativeBias)}
