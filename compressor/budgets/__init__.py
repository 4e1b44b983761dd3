"""Budgets: limits on latency, multiply-adds, parameters, memory, energy or any Python function."""
