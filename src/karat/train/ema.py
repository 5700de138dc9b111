"""The exponential moving average of a model's weights.

timm's ModelEmaV3 keeps a deep copy of the module, which a sharded (FSDP) one refuses to give; this keeps the averaged
tensors alone, in whatever layout the parameters have, and lends them to the model while it is evaluated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class WeightAverage:
    """ema <- decay x ema + (1 - decay) x weight after every update; each shared parameter is averaged once."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.parameters = dict(model.named_parameters())
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights."""
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self.parameters.values()], 1 - self.decay)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own, bit for bit."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._give(self.shadow)
        try:
            yield
        finally:
            self._give(own)

    @torch.no_grad()
    def _give(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        for module in self.sharded:  # those that evaluation left gathered would go on with the values before
            module.reshard()

    @torch.no_grad()
    def restart(self) -> None:
        """Let the average begin at the model's present weights."""
        for name, parameter in self.parameters.items():
            self.shadow[name].copy_(parameter)
