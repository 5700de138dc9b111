"""How streaming cuts its work: tiles of heads, images, queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Ranges of heads, images, queries and keys."""

    heads: slice
    images: slice
    queries: slice
    keys: slice

    @property
    def pairs(self) -> tuple[int, int]:
        """How many heads and images."""
        return self.heads.stop - self.heads.start, self.images.stop - self.images.start

    def rows(self, x: Tensor, places: slice) -> Tensor:
        """Queries or keys of the tile, x head by head (H,B,places,D): (heads·images, places, D)."""
        return x[self.heads, self.images, places].flatten(0, 1)

    def parameters(self, u: Tensor) -> Tensor:
        """u (H,1|B,F,N,E) of the tile: (heads·images, F, keys, E), not copied where one head's images share it."""
        if u.shape[1] == 1:
            return u[self.heads, :, :, self.keys].expand(-1, self.pairs[1], -1, -1, -1).flatten(0, 1)
        return u[self.heads, self.images, :, self.keys].flatten(0, 1)

    def of_pairs(self, x: Tensor) -> Tensor:
        """A bias or mask (B|1,H|1,M|1,N|1) of the tile: (heads|1, images|1, queries|1, keys|1)."""
        ranges = (self.images, self.heads, self.queries, self.keys)
        part = x[tuple(some if size > 1 else slice(None) for some, size in zip(ranges, x.shape, strict=True))]
        return part.transpose(0, 1)


def _ranges(size: int, most: int) -> Iterator[slice]:
    """0..size in ranges of at most `most`, nearly equal."""
    count = max(1, ceil(size / max(1, most)))
    each = max(1, ceil(size / count))
    for start in range(0, size, each):
        yield slice(start, min(start + each, size))


def tiles(q: Tensor, num_keys: int, numbers_per_pair: int, most_numbers: int, most_keys: int) -> Iterator[Tile]:
    """Cut heads, images, queries (of q, (H,B,M,D)) and keys into tiles of about `most_numbers` buffer entries each.

    A (query, key) pair takes `numbers_per_pair` of them. Keys come in ranges of at most `most_keys`. A tile is deep
    rather than wide: several images first, one a thread at least, as a batch of products shares out better than one.
    """
    heads, images, queries = q.shape[:3]
    keys = next(_ranges(num_keys, most_keys), slice(0, 1)).stop
    rows = max(1, most_numbers // max(1, numbers_per_pair * keys))
    threads = torch.get_num_threads() if q.device.type == "cpu" else 1
    deep = min(max(1, images), max(threads, rows // max(1, queries)))
    wide = max(1, rows // deep)
    several = max(1, rows // max(1, images * queries)) if deep == images else 1
    for some_heads in _ranges(heads, several):
        for some_images in _ranges(images, deep):
            for some_queries in _ranges(queries, wide):
                for some_keys in _ranges(num_keys, most_keys):
                    yield Tile(some_heads, some_images, some_queries, some_keys)
