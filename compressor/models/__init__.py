"""Models by name, with random, default or given weights."""

from __future__ import annotations

from compressor.models.create import (
    Published,
    build_from_factory,
    create_model,
    factory_of,
    model_factory,
    published,
    usual_classes,
)
from compressor.models.first_run import input_channels
from compressor.models.weights import load_weights, read_weights

__all__ = [
    "Published",
    "build_from_factory",
    "create_model",
    "factory_of",
    "input_channels",
    "load_weights",
    "model_factory",
    "published",
    "read_weights",
    "usual_classes",
]
