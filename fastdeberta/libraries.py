"""The compiled libraries: where they are, and why one is not there."""

from functools import cache
from pathlib import Path

import torch


@cache
def load(name: str) -> str | None:
    """Loads `_C` (CPU) or `_C_cuda` once; returns None, or the reason why it cannot be used.

    `_C_cuda` loads without a GPU.
    """
    if name == "_C_cuda" and torch.version.cuda is None:
        return f"fastdeberta._C_cuda needs a CUDA build of torch, and {torch.__version__} is none"
    found = sorted(Path(__file__).parent.glob(f"{name}.*so"))
    if not found:
        needed = ", with nvcc on the PATH" if name == "_C_cuda" else ""
        command = "pip install --no-build-isolation fastdeberta"
        return f"fastdeberta.{name} is not built ({command}{needed})"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        # torch's own message names the file; the cause says what that misses.
        return f"fastdeberta.{name} does not load: {error.__cause__ or error}"
    return None
