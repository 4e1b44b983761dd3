"""The exporter under the name that documentation and users' scripts import; it is in `convert/to_onnx.py`."""

from export.convert.to_onnx import check_parity, export_onnx

__all__ = ["check_parity", "export_onnx"]
