"""The learnable operator: its settings and rules, parameters, orders, start, and the token grids it lives on."""

from karat.operator.config import KArAtConfig
from karat.operator.operator import KArAtOperator, karat_operators

__all__ = ["KArAtConfig", "KArAtOperator", "karat_operators"]
