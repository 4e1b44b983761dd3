"""Network latency on a device: latency tables, their measurement and their predictions."""
