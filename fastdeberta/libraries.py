"""The compiled libraries: where they are, and why one is not there."""

from functools import cache
from pathlib import Path

import torch


@cache
def load(name: str) -> str | None:
    """Loads `_C` (CPU) or `_C_cuda` once; returns None, or the reason why it cannot be used."""
    found = sorted(Path(__file__).parent.glob(f"{name}.*so"))
    if not found:
        return f"fastdeberta.{name} is not built (pip install --no-build-isolation fastdeberta)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"fastdeberta.{name} does not load: {error}"
    return None
