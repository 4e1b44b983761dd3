"""Joint training of weights and structure (arXiv 2403.19490)."""
