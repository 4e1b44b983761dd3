"""ONNX export, parity, engines and on-device measurement; independent of the `compressor` package."""
