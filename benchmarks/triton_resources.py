"""Registers, spills and instructions of every kernel that the triton backend ships, by target.

python -m benchmarks.triton_resources [--targets sm_80,sm_90] [--out FILE] [--check]

The backend's own launches are recorded on tensors without memory, and what they would launch is
compiled. Nothing is run.
"""

import argparse
import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from fastdeberta import RelativePosition
from fastdeberta.backends import AttentionParams
from fastdeberta.backends.triton import configs, launch

from . import sass

RULE = RelativePosition()


@dataclass(frozen=True)
class Variant:
    """A call whose launches are compiled. options: of a training batch with everything in it."""

    dtype: torch.dtype
    head_dim: int
    length: int
    options: bool = False

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), f"d{self.head_dim}", f"L{self.length}"]
        return " ".join(words + ["all options"] * self.options)


SHORT, LONG = 512, 2048
VARIANTS = [
    *(Variant(torch.bfloat16, d, n) for d in (64, 32, 128, 256) for n in (SHORT, LONG)),
    Variant(torch.float16, 64, SHORT),
    Variant(torch.bfloat16, 64, LONG, options=True),
    *(Variant(torch.float32, d, LONG) for d in (64, 128, 256)),
]


@dataclass(frozen=True)
class Launched:
    kernel: Any
    warps: int
    stages: int
    arguments: dict[str, Any]
    block: int

    @property
    def name(self) -> str:
        return self.kernel.__name__


def launches(variant: Variant, target: str) -> Iterator[Launched]:
    """What a forward and a backward pass of a variant launch on a target."""
    found: list[Launched] = []

    def record(kernel, grid, how, values) -> None:
        arguments = {name: values[name] for name in kernel.arg_names}
        if kernel.__name__ not in {x.name for x in found} or "bands" not in arguments:
            found.append(Launched(kernel, how.warps, how.stages, arguments, values["BLOCK"]))

    heads, size, batch = 12, variant.head_dim, 2
    tokens = batch * variant.length

    def empty(*shape: int, dtype: torch.dtype = variant.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value, dout, out = (empty(tokens, heads, size) for _ in range(5))
    table = empty(2 * RULE.span, heads, size)
    every = variant.options
    params = AttentionParams(
        empty(batch + 1, dtype=torch.int32) if every else None,
        empty(tokens, dtype=torch.bool) if every else None,
        RULE.table(),
        empty(2, dtype=torch.int64) if every else None,
        variant.length,
        False,
        0.1 if every else 0.0,
        0.1,
        every,
    )
    family = "amd" if target.startswith("gfx") else target
    with (
        mock.patch.object(launch, "launch", record),
        mock.patch.object(configs, "family", lambda device: family),
    ):
        launch.forward(query, key, value, table, table, params)
        lse = empty(heads, tokens, dtype=torch.float32)
        launch.backward(dout, query, key, value, table, table, out, lse, params)
    unique = {}
    for x in found:
        constants = tuple((k, v) for k, v in x.arguments.items() if k.isupper())
        unique.setdefault((x.name, x.warps, x.stages, constants), x)
    return iter(unique.values())


if __name__ == "__main__":
    import sys

    for t in sys.argv[1].split(","):
        for v in VARIANTS:
            if len(sys.argv) > 2 and not any(w in str(v) for w in sys.argv[2].split(",")):
                continue
            for x in launches(v, t):
                if len(sys.argv) > 3 and not any(w == x.name for w in sys.argv[3].split(",")):
                    continue
                try:
                    c = sass.compile(
                        x.kernel, x.arguments, t, num_warps=x.warps, num_stages=x.stages
                    )
                except Exception as e:
                    print(t, v, x.name, "FAIL", repr(e)[:600])
                    continue
                print(
                    t,
                    v,
                    x.name,
                    f"w{x.warps} s{x.stages} r{c.registers} spill {c.spill_stores}/{c.spill_loads} smem {c.shared} at {c.atomics} {c.seconds:.1f}s",
                    [(l.total, l.matrix, l.scalar_loads, l.shared) for l in c.loops],
                    flush=True,
                )
