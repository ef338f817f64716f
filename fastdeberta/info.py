"""What this installation is and can do."""

import json
import platform
from typing import Any

import torch

from . import __version__, libraries
from .backends import available_backends
from .op import explain
from .relative_position import RelativePosition


def collect() -> dict[str, Any]:
    """Versions, devices, backends with their reasons, build flags, the backend of typical calls."""
    build: dict[str, Any] = {}
    for name, flags in (("_C", "flags"), ("_C_cuda", "cuda_flags")):
        reason = libraries.load(name)
        build[name] = "loaded" if reason is None else reason
        if reason is None:
            build[flags] = json.loads(getattr(torch.ops, f"fastdeberta{name}").build_info())
    return {
        "fastdeberta": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "devices": _devices(),
        "backends": available_backends(),
        "build": build,
        "kernels": {
            shape: str(explain(*_example(*size), relative_position=RelativePosition()))
            for shape, size in {
                "v3-base, 1x128, float32": (1, 128, 12, 64, torch.float32),
                "v3-base, 4x512, bfloat16": (4, 512, 12, 64, torch.bfloat16),
            }.items()
        },
    }


def _devices() -> list[str]:
    devices = [f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        details = [torch.cuda.get_device_name(index)]
        if torch.version.cuda:  # ROCm numbers differently
            details.append("sm_{}{}".format(*torch.cuda.get_device_capability(index)))
        devices.append(f"cuda:{index} ({', '.join(details)})")
    if len(devices) == 1:
        built = torch.version.cuda
        reason = f"is built for CUDA {built}, but sees none" if built else "is not a CUDA build"
        devices.append(f"no GPU (torch {reason})")
    return devices


def _example(
    batch: int, length: int, heads: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content = torch.empty(batch, length, heads, size, dtype=dtype, device=device)
    table = torch.empty(2 * RelativePosition().span, heads, size, dtype=dtype, device=device)
    return content, content, content, table, table


def render(values: dict[str, Any], indent: int = 0) -> str:
    """The same as text."""
    lines = []
    for key, value in values.items():
        prefix = " " * indent + f"{key}: "
        if isinstance(value, dict):
            lines += [prefix.rstrip(), render(value, indent + 2)]
        elif isinstance(value, list):
            lines.append(prefix + ", ".join(map(str, value)))
        else:
            text = "usable" if value is None else str(value)
            lines.append(prefix + text.replace("\n", "\n" + " " * (indent + 2)))
    return "\n".join(lines)
