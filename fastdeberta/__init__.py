"""Fused disentangled attention, and the DeBERTa and ELECTRA models built on it."""

from .backends import available_backends
from .op import disentangled_attention, explain
from .relative_position import RelativePosition

__version__ = "0.1.0"
