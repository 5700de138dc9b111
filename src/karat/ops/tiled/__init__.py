"""Basis attention in plain PyTorch, tile by tile."""
