"""All rules of the toolkit: importing this module registers them, before those of others."""

from compressor.pruning import rules_join, rules_layers, rules_pointwise, rules_products, rules_shape
from compressor.pruning.registry import register_rule

__all__ = ["register_rule", "rules_join", "rules_layers", "rules_pointwise", "rules_products", "rules_shape"]
