"""Registers all rules on import (`registry.rule`)."""

from compressor.pruning import rules_join, rules_layers, rules_pointwise, rules_products, rules_shape

__all__ = ["rules_join", "rules_layers", "rules_pointwise", "rules_products", "rules_shape"]
