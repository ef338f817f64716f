"""One rule for "close enough", for every dtype and every test of attention.

The truth is computed in float64. What is tested may err at most twice as much as plain PyTorch of
the same dtype errs on the same inputs, plus a fixed allowance for values whose truth is zero. The
largest error may also have one rounding of the largest value more: of few values, none may have
been rounded far by luck.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FACTOR = 2.0
ATOL = {
    torch.float64: 1e-11,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def assert_close(
    ours: Mapping[str, Tensor],
    peer: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Compares tensors of the same names.

    Args:
        ours: what is tested.
        peer: plain PyTorch in `dtype`.
        truth: float64.
        dtype: chooses the allowance.
    """
    assert ours.keys() == peer.keys() == truth.keys()
    failures = []
    for name in truth:
        mine, theirs = _errors(ours[name], truth[name]), _errors(peer[name], truth[name])
        finite = truth[name].nan_to_num(0.0, 0.0, 0.0).abs()
        rounding = torch.finfo(dtype).eps / 2 * finite.max().item() if finite.numel() else 0.0
        for measure in mine:
            limit = FACTOR * theirs[measure] + ATOL[dtype]
            limit += rounding if measure == "max" else 0.0
            if not mine[measure] <= limit:  # NaN fails too.
                failures.append(f"{name}: {measure} error {mine[measure]:.3g} > {limit:.3g}")
    assert not failures, "; ".join(failures)


def _errors(x: Tensor, truth: Tensor) -> dict[str, float]:
    """Largest and root-mean-square error; infinite where infinities do not match."""
    assert x.shape == truth.shape, f"shape {tuple(x.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return {"max": 0.0, "rms": 0.0}
    x, truth = x.detach().double().cpu(), truth.detach().cpu()
    same = x.isinf() & (x == truth)
    error = torch.where(same, 0.0, x - truth).abs()
    return {"max": error.max().item(), "rms": error.square().mean().sqrt().item()}
