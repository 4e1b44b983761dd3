"""Devices: bundles for a board, ssh, the results that come back, and the GPU of this machine."""
