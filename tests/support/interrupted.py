"""A run that dies on its way."""

from __future__ import annotations

from karat.train.engine import Trainer


class CutOff(BaseException):
    """Stands for the process's death: nothing in the package catches it."""


class Doomed(Trainer):
    """Dies after its n-th update."""

    lives = 0

    def after_step(self) -> None:
        self.lives -= 1
        if self.lives == 0:
            raise CutOff
