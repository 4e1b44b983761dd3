"""Models by name, with fresh, default or given weights."""

from __future__ import annotations

from compressor.models.create import build_from_factory, create_model, factory_of, model_factory
from compressor.models.weights import load_weights, read_weights

__all__ = [
    "build_from_factory",
    "create_model",
    "factory_of",
    "load_weights",
    "model_factory",
    "read_weights",
]
