"""What attention learned and what it costs: arrays first (no plotting in them), figures and report on top.

Submodules are imported by name, e.g. `from karat.analyze.attention import attention_of`; nothing is imported here,
so that arrays need no plotting library and figures no training library.
"""
