"""ONNX, parity, engines and measurement; knows nothing of pruning and never imports the compressor."""
