"""Complete models: encoders, heads, checkpoints."""

from .checkpoint import from_pretrained
from .config import Config
from .model import Model, ModelOutput

__all__ = ["Config", "Model", "ModelOutput", "from_pretrained"]
