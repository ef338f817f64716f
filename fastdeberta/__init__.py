"""Fused disentangled attention, and the DeBERTa and ELECTRA models built on it."""

from . import models
from .attention import DisentangledAttention
from .backends import available_backends
from .integrations.transformers import accelerate, restore
from .op import disentangled_attention, explain
from .relative_position import RelativePosition

__version__ = "0.1.0"

__all__ = [
    "DisentangledAttention",
    "RelativePosition",
    "accelerate",
    "available_backends",
    "disentangled_attention",
    "explain",
    "models",
    "restore",
]
