"""Something that looks on while operators are called."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Looker(TorchDispatchMode):
    """Something beside autograd that looks on, and names the operators of ours that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "karat":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))
