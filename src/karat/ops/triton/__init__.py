"""Basis attention on GPUs in Triton."""
