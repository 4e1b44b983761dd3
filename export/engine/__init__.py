"""Engines: building, caching, running and timing them, and timing through ONNX Runtime."""
