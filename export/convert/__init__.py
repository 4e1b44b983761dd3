"""Conversion: ONNX files and `torch.export` programs, their precisions, and their parity with the network."""
