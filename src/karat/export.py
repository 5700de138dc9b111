"""`karat.share.export` under its old path."""

from karat.share.export import export_onnx, export_pt2, exported_program, plain_path

__all__ = ["export_onnx", "export_pt2", "exported_program", "plain_path"]
