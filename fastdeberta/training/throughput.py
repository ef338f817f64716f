"""How much of what the device can do a run uses."""

import time

import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def utilization(rate: float, device: torch.device, precision: str) -> dict[str, float]:
    """Model-FLOPs utilisation, of the peak measured here, for `rate` operations a second."""
    peak = peak_flops(device, precision)
    return {"peak_flops_per_second": peak, "model_flops_utilization": rate / peak}


def peak_flops(device: torch.device, precision: str, seconds: float = 0.1) -> float:
    """Operations a second of a large product of two matrices, the best of several rounds."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=_DTYPES[precision])
    b, best, deadline = torch.randn_like(a), float("inf"), None
    while deadline is None or time.perf_counter() < deadline:
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if deadline is None:  # The first product sets the library up.
            deadline = time.perf_counter() + seconds
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
