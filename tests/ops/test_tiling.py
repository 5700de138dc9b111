"""Tiles cover every (head, image, query, key) once, and are as small as asked for."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from karat.ops.cache import cache_bytes
from karat.ops.tiled.tiling import tiles

sizes = st.integers(0, 7)


@given(sizes, sizes, sizes, sizes, st.integers(1, 9), st.integers(1, 500), st.integers(1, 8), st.integers(1, 3))
def test_every_pair_once(
    B: int, H: int, M: int, N: int, per_pair: int, most_numbers: int, most_keys: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    seen = torch.zeros(B, H, M, N, dtype=torch.long)
    for tile in tiles(torch.empty(H, B, M, 1), N, per_pair, most_numbers, most_keys):
        part = seen[tile.images, tile.heads, tile.queries, tile.keys]
        assert part.shape[:2] == tile.pairs[::-1]
        assert part.shape[3] <= most_keys
        # Within the buffer, or no larger than one query of one image a thread.
        assert part.numel() * per_pair <= max(most_numbers, threads * part.shape[3] * per_pair)
        part += 1
    assert (seen == 1).all()


def test_the_cache_has_a_size() -> None:
    assert 1 << 14 <= cache_bytes() <= 1 << 30
