"""Data as a recipe's run reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from karat.data.splits import Data, DataOptions, load_data
from karat.runs.recipes import Recipe


def load(spec: str | Path, recipe: Recipe, **options: Any) -> Data:
    """The batches of a spec under a recipe, in its batch size unless the options say another."""
    return load_data(DataOptions(str(spec), recipe.augmentation, **{"batch_size": recipe.batch_size, **options}))


BACK = {  # EXIF orientation -> how a camera that was held so stores the upright picture
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def store_turned(path: Path, orientation: int) -> None:
    """Rewrite an image file as a camera that was held so would have stored it."""
    exif = Image.Exif()
    exif[0x112] = orientation
    with Image.open(path) as picture:
        picture.transpose(BACK[orientation]).save(path, exif=exif)
