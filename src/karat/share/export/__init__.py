"""Models as graphs that run without karat: ONNX and torch.export, both through the pure-PyTorch path."""

from karat.share.export.graph import exported_program, plain_path
from karat.share.export.onnx import export_onnx
from karat.share.export.pt2 import export_pt2

__all__ = ["export_onnx", "export_pt2", "exported_program", "plain_path"]
