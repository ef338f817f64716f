"""Complete models: encoders, heads, checkpoints."""

from .checkpoint import from_pretrained
from .config import Config
from .encoded import ModelOutput
from .model import Model

__all__ = ["Config", "Model", "ModelOutput", "from_pretrained"]
