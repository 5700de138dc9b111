"""`karat.runs.recipes` under its old path."""

from karat.runs.recipes import RECIPES, Recipe, get_recipe

__all__ = ["RECIPES", "Recipe", "get_recipe"]
