"""A run from its recipe to its report: `pipeline` is the main path."""
