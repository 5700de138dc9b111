"""The published property of each start, measured on a model as it was built."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from karat.models.backbones import attention_sites
from karat.models.starts import position_maps, shifted

STEPS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def products(model: nn.Module) -> tuple[Tensor, Tensor]:
    """W_q W_kᵀ (L,H,C,C) and W_v W_o (L,C,C)."""
    pairs, out = [], []
    for block in model.blocks:
        q, k, v = block.attn.qkv.weight.detach().double().unflatten(0, (3, -1))
        heads = [x.unflatten(0, (block.attn.num_heads, -1)) for x in (q, k)]
        pairs.append(heads[0].transpose(-2, -1) @ heads[1])
        out.append(v.T @ block.attn.proj.weight.detach().double().T)
    return torch.stack(pairs), torch.stack(out)


def diagonal(product: Tensor) -> Tensor:
    """The mean of the diagonal, over the root mean square of all else."""
    C = product.shape[-1]
    others = product * (1 - torch.eye(C))
    return product.diagonal(dim1=-2, dim2=-1).mean(-1) / others.square().sum((-2, -1)).div(C * (C - 1)).sqrt()


def nearest_shift(found: Tensor, grid: tuple[int, int]) -> tuple[float, tuple[int, int]]:
    """The correlation of a map (N,N) with the nearest of the nine shifts, and its step.

    Queries whose key lies beyond the border look nowhere in particular, and don't count.
    """
    near = []
    for step in STEPS:
        shift = shifted(grid, *step)
        inside = shift.sum(1) > 0
        pair = torch.stack([found.double()[inside].flatten(), shift[inside].flatten()])
        near.append((torch.corrcoef(pair)[0, 1].item(), step))
    return max(near)


def shifts(model: nn.Module) -> list[tuple[float, tuple[int, int]]]:
    """`nearest_shift` of every head of every block, of the map that position embeddings alone give."""
    grid = model.patch_embed.grid_size
    with torch.no_grad():
        maps = torch.cat([position_maps(model, site) for site in attention_sites(model)])
    return [nearest_shift(one, grid) for one in maps]


def check_published(name: str, model: nn.Module) -> None:
    """mimetic: diagonals stand out, + of queries and keys, − of values; matched: none does; impulse: shifts, to 0.9."""
    if name == "impulse":
        assert min(near for near, _ in shifts(model)) > 0.9
        return
    pairs, out = (diagonal(product) for product in products(model))
    if name == "mimetic":
        assert pairs.min() > 3
        assert out.max() < -3
    else:
        assert max(pairs.abs().max(), out.abs().max()) < 1
