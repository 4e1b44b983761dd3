"""The rules of the toolkit: importing this package registers them, before those of others."""

from compressor.pruning.registry import register_rule
from compressor.pruning.rules import layers, moves, pointwise

__all__ = ["layers", "moves", "pointwise", "register_rule"]
