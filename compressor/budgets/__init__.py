"""Costs and their limits: latency, multiply-adds, parameters, memory, any Python function."""
