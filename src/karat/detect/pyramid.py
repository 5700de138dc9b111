"""The simple feature pyramid (ViTDet, arXiv 2203.16527, §3): every level from the trunk's one and only map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

SCALES = (4.0, 2.0, 1.0, 0.5)
LEVELS = ("p2", "p3", "p4", "p5", "p6")


class SimpleFeaturePyramid(nn.Module):
    """Maps at 4, 2, 1 and 1/2 of the trunk's resolution, and p6, p5 subsampled by 2, each of `channels` channels.

    Level by level: transposed convolutions up or max-pooling down, then a 1×1 and a 3×3 convolution, each followed by
    layer normalisation.

    Args:
        trunk: any module with `num_features` that maps images (B,3,S,S) and sizes to (B,num_features,g,g).
        channels: of every level.

    Attributes: trunk, out_channels (torchvision reads it).
    """

    def __init__(self, trunk: nn.Module, channels: int = 256) -> None:
        super().__init__()
        self.trunk = trunk
        self.out_channels = channels
        width: Any = trunk.num_features
        self.levels = nn.ModuleList(_level(width, scale, channels) for scale in SCALES)

    def forward(self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> dict[str, Tensor]:
        """{"p2": (B,channels,4g,4g), ..., "p5": (B,channels,g/2,g/2), "p6": half of that}."""
        x = self.trunk(images, sizes)
        maps = [level(x) for level in self.levels]
        maps.append(maps[-1][:, :, ::2, ::2])  # max-pooling with a 1×1 kernel and stride 2
        return dict(zip(LEVELS, maps, strict=True))


def _level(width: int, scale: float, channels: int) -> nn.Sequential:
    steps: list[nn.Module] = []
    if scale == 4:
        steps += [nn.ConvTranspose2d(width, width // 2, 2, 2), LayerNorm2d(width // 2), nn.GELU()]
        steps += [nn.ConvTranspose2d(width // 2, width // 4, 2, 2)]
        width //= 4
    elif scale == 2:
        steps += [nn.ConvTranspose2d(width, width // 2, 2, 2)]
        width //= 2
    elif scale == 0.5:
        steps += [nn.MaxPool2d(2, 2)]
    steps += [nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)]
    steps += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]
    return nn.Sequential(*steps)


def as_float(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """The maps in float32 (float64 stays)."""
    return {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in maps.items()}
