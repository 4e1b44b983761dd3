"""Structured pruning: prunable channel groups of a network, their costs, and the pruned network."""
