"""`karat.data.images` and `augmentation` under its old path."""

from karat.data.augmentation import eval_transform, train_transform
from karat.data.images import Fit, Normalise, statistics
from karat.data.images import read_image as decode

__all__ = ["Fit", "Normalise", "decode", "eval_transform", "statistics", "train_transform"]
