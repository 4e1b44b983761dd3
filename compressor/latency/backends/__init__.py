"""The runtimes of this machine that time networks: ONNX Runtime on the CPU, and those of the GPU."""
