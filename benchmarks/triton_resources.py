"""Registers, spills and instructions of every kernel that the triton backend ships, by target.

    python -m benchmarks.triton_resources [--targets sm_80,sm_90] [--out FILE] [--check]

The backend's own launches are recorded on tensors without memory, and what they would launch is
compiled. Nothing is run. --check compares with the limits beside the kernels, status 1 past one.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from fastdeberta.backends import AttentionParams
from fastdeberta.backends.triton import configs, launch, limits

from . import sass
from .cases import RULE

SHORT, LONG = 512, 2048


@dataclass(frozen=True)
class Variant:
    """A call whose launches are compiled. options: packed, masked, dropout, uniform rows."""

    dtype: torch.dtype
    head_dim: int
    length: int
    options: bool = False
    terms: tuple[str, ...] = ("c2p", "p2c")
    causal: bool = False

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), f"d{self.head_dim}", f"L{self.length}"]
        words += ["all options"] * self.options + ["causal"] * self.causal
        if len(self.terms) < 2:
            words.append(" ".join(self.terms) or "content only")
        return " ".join(words)


# Every configuration that is shipped, and what else changes the code of its kernels.
VARIANTS = [
    *(Variant(torch.bfloat16, d, n) for d in (64, 32, 128, 256) for n in (SHORT, LONG)),
    Variant(torch.float16, 64, SHORT),
    Variant(torch.bfloat16, 64, LONG, options=True),
    *(Variant(torch.float32, d, LONG) for d in (64, 128, 256)),
    Variant(torch.bfloat16, 64, SHORT, terms=("c2p",)),
    Variant(torch.bfloat16, 64, LONG, terms=("p2c",), causal=True),
    Variant(torch.bfloat16, 64, SHORT, terms=()),
]


@dataclass(frozen=True)
class Resources:
    """One kernel of one variant on one target. tile: scores of a loop's body; 0: it has none."""

    variant: Variant
    kernel: str
    tile: int
    compiled: sass.Compiled

    @property
    def per_score(self) -> float | None:
        """Instructions of one thread a score, in the shortest loop with products: whole tiles."""
        totals = [loop.total for loop in self.compiled.loops if loop.matrix]
        if not totals or not self.tile:
            return None
        return self.compiled.per_element(min(totals), self.tile)

    @property
    def scalar_loads(self) -> float | None:
        loops = [loop for loop in self.compiled.loops if loop.matrix]
        if not loops or not self.tile:
            return None
        least = min(loops, key=lambda loop: loop.total)
        return self.compiled.per_element(least.scalar_loads, self.tile)


def launches(variant: Variant, target: str) -> dict[tuple, tuple[Any, Any, dict[str, Any]]]:
    """(kernel, launch configuration, arguments) of a forward and a backward pass on a target."""
    found: dict[tuple, tuple[Any, Any, dict[str, Any]]] = {}

    def record(kernel, grid, how, values) -> None:
        arguments = {name: values[name] for name in kernel.arg_names}
        constants = tuple((k, v) for k, v in arguments.items() if k.isupper())
        found.setdefault((kernel.__name__, how, constants), (kernel, how, arguments))

    heads, batch = 12, 2
    tokens = batch * variant.length

    def empty(*shape: int, dtype: torch.dtype = variant.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value, dout, out = (empty(tokens, heads, variant.head_dim) for _ in range(5))
    table = empty(2 * RULE.span, heads, variant.head_dim)
    tables = [table if term in variant.terms else None for term in ("c2p", "p2c")]
    every = variant.options
    params = AttentionParams(
        cu_seqlens=empty(batch + 1, dtype=torch.int32) if every else None,
        key_mask=empty(tokens, dtype=torch.bool) if every else None,
        rows=RULE.table() if variant.terms else None,
        rng_state=empty(2, dtype=torch.int64) if every else None,
        max_seqlen=variant.length,
        causal=variant.causal,
        dropout_p=0.1 if every else 0.0,
        softmax_scale=0.1,
        uniform_padding=every,
    )
    family = "amd" if target.startswith("gfx") else target
    with (
        mock.patch.object(launch, "launch", record),
        mock.patch.object(configs, "family", lambda device: family),
    ):
        launch.forward(query, key, value, *tables, params)
        lse = empty(heads, tokens, dtype=torch.float32)
        launch.backward(dout, query, key, value, *tables, out, lse, params)
    return found


def tile(kernel: str, arguments: dict[str, Any]) -> int:
    """Scores, or products with distances, of one turn of a kernel's loop."""
    block = arguments["BLOCK"]
    if kernel in ("forward_kernel", "near_dkv_kernel"):
        return block * block
    if kernel in ("dq_kernel", "dkv_kernel"):
        return block * arguments["STEP"]
    return arguments["ROWS"] * arguments["COLUMNS"] if "ROWS" in arguments else 0


def resources(job: tuple[Variant, str]) -> list[Resources]:
    variant, target = job
    return [
        Resources(
            variant,
            name,
            tile(name, arguments),
            sass.compile(kernel, arguments, target, num_warps=how.warps, num_stages=how.stages),
        )
        for (name, _, _), (kernel, how, arguments) in launches(variant, target).items()
    ]


def collect(targets: Iterable[str]) -> list[Resources]:
    """Everything, compiled by as many processes as there are cores."""
    jobs = [(variant, target) for target in targets for variant in VARIANTS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return [found for part in pool.map(resources, jobs) for found in part]


def find(found: list[Resources], target: str, kernel: str, length: int) -> float:
    """Instructions a score of a bfloat16 kernel with head dim 64."""
    (one,) = [
        x
        for x in found
        if x.kernel == kernel
        and x.compiled.target == target
        and x.variant == Variant(torch.bfloat16, 64, length)
    ]
    assert one.per_score is not None
    return one.per_score


def sums(found: list[Resources], target: str) -> dict[str, float]:
    """Instructions a score of whole passes, in the words of limits.INSTRUCTIONS."""

    def cost(kernel: str, length: int = SHORT) -> float:
        return find(found, target, kernel, length)

    bands = 2 * cost("band_kernel")
    return {
        "forward near": cost("forward_kernel") + bands,
        "forward far": cost("forward_kernel", LONG),
        "backward near": cost("dq_kernel")
        + cost("near_dkv_kernel")
        + bands
        + 2 * cost("position_content_kernel")
        + 2 * cost("position_table_kernel"),
        "backward far": cost("dq_kernel", LONG) + cost("dkv_kernel", LONG),
    }


def products(length: int, block: int, rows: int, columns: int) -> int:
    """Products with distances that band_kernel makes for one head, those for no score included."""
    _, first, last = RULE.table()
    end, total = -(-length // block) * block, 0
    for low, high in ((-last, -first), (first, last)):
        for x0 in range(0, end, 8 * rows):
            c_low = max(low + 1 - 2 * block, -x0 - 8 * (rows - 1)) // 8 * 8
            c_high = min(high + 2 * block + 6, end - x0)
            total += 8 * rows * columns * -(-max(c_high - c_low, 0) // columns)
    return total


def near_scores(length: int, block: int) -> int:
    """Scores of near tiles, and of all tiles, of one head."""
    _, first, last = RULE.table()
    tiles = -(-length // block)
    near = 0
    for i in range(tiles):
        low = max(i * block - last + 1, 0) // block
        near += min((i * block + 2 * block - 2 - first) // block, tiles) - low
    return near * block * block


def whole_call(found: list[Resources], target: str, length: int) -> float:
    """Instructions a score of a whole forward pass, bands with what they compute in vain."""
    config = configs._default(target, False, 64, False, length > SHORT)
    config = launch._for_length(config, length)
    near = near_scores(length, config.block)
    every = (-(-length // config.block) * config.block) ** 2
    band = products(length, config.block, config.rows, config.columns)
    total = (
        near * find(found, target, "forward_kernel", SHORT)
        + (every - near) * find(found, target, "forward_kernel", LONG)
        + band * find(found, target, "band_kernel", SHORT)
    )
    return total / length**2


def memory_traffic(batch: int, heads: int, length: int, head_dim: int = 64) -> tuple[float, float]:
    """Megabytes that a bfloat16 forward pass moves to and from memory, if the workspace stays in
    the GPU's cache, and if none of it does."""
    config = launch._for_length(configs._default("sm_90", False, head_dim, False, True), length)
    _, first, last = RULE.table()
    made = launch.plan(
        batch * heads, length, first, last, False, config, config.block**2 * 2, launch._WORKSPACE
    )
    content = 4 * batch * heads * length * head_dim * 2 + 4 * batch * heads * length
    tables = (
        2 * 2 * heads * 2 * made.reach * head_dim * 2 + 2 * 2 * RULE.span * heads * head_dim * 2
    )
    bands = 2 * 2 * 2 * batch * heads * near_scores(length, config.block)
    return (content + tables) / 1e6, (content + tables + bands) / 1e6


def allowed_spills(x: Resources) -> int:
    if x.variant.options:
        return limits.SPILLS_DROPOUT
    if x.variant.dtype == torch.float32 and x.variant.head_dim > 128:
        return limits.SPILLS_FLOAT32_WIDE
    if x.kernel == "fold_kernel":
        return limits.SPILLS_FOLD
    other = len(x.variant.terms) == 1 or x.variant.head_dim < 64
    return limits.SPILLS_OTHER if other else limits.SPILLS


def past_limits(found: list[Resources]) -> Iterator[str]:
    for x in found:
        c, v = x.compiled, x.variant
        where = f"{c.target}, {v}, {x.kernel}"
        allowed = allowed_spills(x)
        if c.spill_stores > allowed:
            yield f"{where}: {c.spill_stores} spills, allowed {allowed}"
        if c.atomics:
            yield f"{where}: {c.atomics} atomic operations"
        if x.kernel == "forward_kernel" and x.scalar_loads:
            yield f"{where}: {x.scalar_loads:.2f} scalar loads a score"
    for target in {x.compiled.target for x in found} & set(limits.INSTRUCTIONS):
        for what, cost in sums(found, target).items():
            if cost > limits.INSTRUCTIONS[target][what]:
                limit = limits.INSTRUCTIONS[target][what]
                yield f"{target}: {what}: {cost:.1f} instructions a score, limit {limit}"


def report(found: list[Resources]) -> Iterator[str]:
    yield "# Resources of the Triton kernels"
    yield ""
    yield f"triton {triton.__version__}; compiled offline, nothing was run: counts, not times."
    yield "Instructions are those of one thread a score, in loops over whole tiles."
    targets = list(dict.fromkeys(x.compiled.target for x in found))
    counted = [t for t in targets if t in limits.INSTRUCTIONS]
    if counted:
        yield from ("", "## Whole passes: bfloat16, head dim 64", "")
        yield "| pass | " + " | ".join(f"{t} (limit)" for t in counted) + " |"
        yield "| --- |" + " --- |" * len(counted)
        totals = {t: sums(found, t) for t in counted}
        for what in totals[counted[0]]:
            cells = (f"{totals[t][what]:.1f} ({limits.INSTRUCTIONS[t][what]})" for t in counted)
            yield f"| {what} | " + " | ".join(cells) + " |"
        yield from (
            "",
            "Near passes count both bands, one product with a distance a score and side. A whole",
            "forward call counts all that bands compute, distances that no score has included:",
            "",
        )
        lengths = (512, 2048, 8192)
        yield "| instructions a score, L = | " + " | ".join(map(str, lengths)) + " |"
        yield "| --- |" + " --- |" * len(lengths)
        for t in counted:
            cells = (f"{whole_call(found, t, n):.1f}" for n in lengths)
            yield f"| {t} | " + " | ".join(cells) + " |"
        yield from ("", "Megabytes to and from memory, forward, bfloat16:", "")
        yield "| B, H, L | bands stay in the cache | bands all go to memory |"
        yield "| --- | --- | --- |"
        for shape in ((4, 12, 512), (2, 12, 2048), (2, 12, 8192)):
            kept, spilled = memory_traffic(*shape)
            yield f"| {', '.join(map(str, shape))} | {kept:.0f} | {spilled:.0f} |"
    for target in targets:
        yield from ("", f"## {target}", "")
        header = (
            "variant", "kernel", "warps", "stages", "registers", "spills st/ld", "shared, bytes",
            "matrix instructions", "instructions a score", "scalar loads a score", "atomics",
        )  # fmt: skip
        yield "| " + " | ".join(header) + " |"
        yield "|" + " --- |" * len(header)
        seen = set()
        for x in found:
            c = x.compiled
            if c.target != target:
                continue
            kinds = ", ".join(f"{n} {kind}" for kind, n in c.matrix.items()) or "-"
            per_score = "-" if x.per_score is None else f"{x.per_score:.1f}"
            scalar = "-" if x.scalar_loads is None else f"{x.scalar_loads:.2f}"
            numbers = (c.registers, f"{c.spill_stores}/{c.spill_loads}", c.shared)
            cells = (x.kernel, c.num_warps, c.num_stages, *numbers, kinds, per_score, scalar)
            if (x.variant.dtype, x.variant.head_dim, *cells) in seen:
                continue  # The same kernel serves both lengths.
            seen.add((x.variant.dtype, x.variant.head_dim, *cells))
            yield "| " + " | ".join(map(str, (x.variant, *cells, c.atomics))) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--targets", default=",".join(sass.TARGETS))
    parser.add_argument("--out", type=Path, help="write the report here instead of showing it")
    parser.add_argument("--check", action="store_true", help="fail past a limit")
    options = parser.parse_args()
    found = collect(options.targets.split(","))
    text = "\n".join(report(found)) + "\n"
    if options.out:
        options.out.write_text(text)
    elif not options.check:
        print(text, end="")
    failures = list(past_limits(found)) if options.check else []
    print(*failures, sep="\n", end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
