"""Weights and structure trained together (arXiv 2403.19490)."""
