"""Learnable attention in other libraries' models, each in a module of its own that is imported when asked for."""
