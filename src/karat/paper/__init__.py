"""The paper as data: every published figure, the settings behind it, the command that repeats it.

The figures are those of arXiv 2503.10632v3, by table (published.csv beside this file).

>>> row = rows("table1", 8)[0]
>>> row.model, row.variant, row.dataset, row.metric, row.value
('vit_base', 'g1b', 'cifar10', 'top1', 81.81)
>>> row.setup.attention, row.setup.recipe, row.setup.batch_size
('g1b,edge_scales=published,init=paper', 'vit', 32)
"""

from karat.paper.entries import TABLES, Entry, rows
from karat.paper.measured import Measured, compare, matching
from karat.paper.run import run_row
from karat.paper.setup import Setup, attention_spec

__all__ = ["TABLES", "Entry", "Measured", "Setup", "attention_spec", "compare", "matching", "rows", "run_row"]
