"""What most processes of tests need, imported, and looked through once by the collection of garbage."""

import gc

import sklearn.datasets  # noqa: F401

import support.training  # noqa: F401

gc.collect()
gc.freeze()
