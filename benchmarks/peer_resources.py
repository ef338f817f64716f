"""What the rivals' Triton kernels cost in machine code, with the tiles that they choose themselves.

    python -m benchmarks.peer_resources [--targets sm_80,sm_90] [--out FILE]

The kernels come from the installed packages and get the arguments that their packages would pass,
for head dimension 64 in bf16. Nothing is run, so no device is needed.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .cases import RULE
from .sass import TARGETS, Compiled, Loop, compile

BATCH, HEADS, HEAD_DIM, DTYPE = 4, 12, 64, torch.bfloat16
SCALE = (3 * HEAD_DIM) ** -0.5

# The longer one is in every package's regime for long sequences.
LENGTHS = 512, 8192

# Bytes of shared memory for a block, multiprocessors: of A100, RTX 3090, RTX 4090, H100, B200 and
# RTX 5090.
DEVICES = {
    "sm_80": (166_912, 108),
    "sm_86": (101_376, 82),
    "sm_89": (101_376, 128),
    "sm_90": (232_448, 132),
    "sm_100": (232_448, 148),
    "sm_120": (101_376, 170),
}


@dataclass(frozen=True)
class Launch:
    """One kernel as its package launches it."""

    what: str
    kernel: Any
    arguments: Mapping[str, Any]
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def schedule(self) -> tuple[Any, ...]:
        tile = self.block_m, self.block_n, self.num_warps, self.num_stages
        return self.what, self.kernel.__name__, self.kernel.__module__, *tile

    def compile(self, target: str) -> Compiled:
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return compile(self.kernel, {**self.arguments, **blocks}, target, **options)


def tensor(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(
    kernel: Any, values: Mapping[str, Any], strides: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What `kernel` takes of `values`, and the strides of tensors by the letters that name them.

    A parameter stride_qb is the first one of the tensor "q", whatever its last letter.
    """
    names = kernel.arg_names
    result = {name: values[name] for name in names if name in values}
    for letters, of in strides.items():
        of_this = [name for name in names if re.fullmatch(rf"stride_{letters}_?[a-z\d]", name)]
        result |= zip(of_this, of.stride(), strict=False)
    return result


def disentangled_flash(target: str, length: int) -> Iterator[Launch]:
    """DisentangledFlash's padded kernels, with the schedules of its heuristic."""
    from disentangled_flash import kernel as inference
    from disentangled_flash.position import SharedPositionPlanCache, aligned_slot_count
    from disentangled_flash.training import _kernels as training
    from disentangled_flash.tuning import (
        DeviceResources,
        heuristic_config,
        tuning_sequence_length,
    )

    plan = SharedPositionPlanCache(
        position_buckets=RULE.span,
        max_relative_positions=RULE.max_distance,
        position_embedding_size=RULE.span,
    ).compact(length, "cpu")
    band, slots = plan.gradient_band, aligned_slot_count(plan.active_slots.numel())
    columns = band.column_slots.numel()
    fused = tensor(BATCH, length, 3 * HEADS, HEAD_DIM).transpose(1, 2)
    query, key, value = fused.split(HEADS, 1)
    c2p = p2c = inference._head_major_scores(query, tensor(HEADS, slots, HEAD_DIM))
    gradient = tensor(BATCH, length, HEADS, HEAD_DIM).transpose(1, 2)
    rows = tensor(BATCH, HEADS, length, dtype=torch.float32)
    banded = tensor(HEADS, BATCH, length, columns)
    of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
    strides = {"q": query, "k": key, "v": value, "go": gradient, "r": c2p}
    strides |= {"dq": of_query, "dk": of_key, "dv": of_value}
    common = {
        "query": query,
        "key": key,
        "value": value,
        "c2p": c2p,
        "p2c": p2c,
        "delta_to_local_slot": plan.delta_to_local,
        "attention_mask": tensor(BATCH, length, dtype=torch.bool),
        "output": tensor(BATCH, length, HEADS * HEAD_DIM),
        "grad_output": gradient,
        "lse_log2": rows,
        "delta": rows,
        "grad_query": of_query,
        "grad_key": of_key,
        "grad_value": of_value,
        "grad_c2p": banded,
        "grad_p2c": banded,
        "BAND_LOW": band.low,
        "BAND_HIGH": band.high,
        "GRAD_COLUMNS": columns,
        "BANDED": True,
        "ACTIVE_SLOTS": slots,
        "BATCH_SIZE": BATCH,
        "NUM_HEADS": HEADS,
        "SEQUENCE_LENGTH": length,
        "POSITION_OFFSET": length - 1,
        "HEAD_DIM": HEAD_DIM,
        "SCORE_SCALE": SCALE,
        "SCORE_SCALE_LOG2": SCALE * 1.4426950408889634,
        "LENGTH_REGIME": tuning_sequence_length(length),
        "HAS_C2P": True,
        "HAS_P2C": True,
        "PHYSICAL_PAIRS": False,
        "IS_BF16": True,
        "IS_FP32": False,
        "STRICT_FP32": True,
    }
    shared, multiprocessors = DEVICES[target]
    resources = DeviceResources(shared, multiprocessors, divmod(TARGETS[target].arch, 10))
    seed = {"dropout_seed": tensor(0, dtype=torch.int64), "DROPOUT_P": 0.0, "DROPOUT_SCALE": 1.0}
    forward, in_training = inference._deberta_attention_forward_kernel, {"STORE_LSE": True, **seed}
    kernels = [
        ("forward", "inference", forward, {"STORE_LSE": False}),
        ("training forward", "training_forward", forward, in_training),
        ("backward dq", "backward_dq", training._backward_dq_dc_kernel, seed),
        ("backward dkv", "backward_dkv", training._backward_dkv_dt_kernel, seed),
    ]
    for what, phase, kernel, own in kernels:
        config = heuristic_config(
            phase=phase,
            sequence_length=length,
            head_dim=HEAD_DIM,
            dtype="bfloat16",
            batch_heads=BATCH * HEADS,
            resources=resources,
        )
        for padding, suffix in ((True, ", padding mask"), (False, "")):
            mask = {"USE_PADDING_MASK": padding, "HAS_PADDING": padding}
            yield Launch(
                what + suffix,
                kernel,
                arguments(kernel, {**common, **own, **mask}, strides),
                config.block_m,
                config.block_n,
                config.num_warps,
                config.num_stages,
            )


def flashdeberta(target: str, length: int) -> Iterator[Launch]:
    """FlashDeBERTa's kernels: those of packed sequences serve long inputs with padding."""
    from flashdeberta.ops import flash_attention as padded
    from flashdeberta.ops import flash_attention_varlen as packed
    from flashdeberta.ops.config import backward_configs, forward_config
    from flashdeberta.ops.position import position_plan

    plan = position_plan(length, length, RULE.span, RULE.max_distance, RULE.span, "cpu")
    common = {
        "sm_scale": SCALE,
        "POS_LUT": plan.lut,
        "BAND_LOW": plan.band_low,
        "NUM_COLUMNS": plan.num_columns,
        "H": HEADS,
        "BLOCK_DMODEL": HEAD_DIM,
        "HAS_C2P": True,
        "HAS_P2C": True,
        "IS_CAUSAL": False,
        "CAUSAL": False,
    }
    lengths = {
        "SEQ_LENGTHS": tensor(BATCH, dtype=torch.int32),
        "Z": BATCH,
        "M": length,
        "N": length,
        "P_SEQ": 0,
        "LARGER_M": False,
    }
    starts = tensor(BATCH + 1, dtype=torch.int32)
    tiles = tensor(BATCH, dtype=torch.int64)  # One entry a tile: of these, too, the dtype counts.
    sequences = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "MAX_N": length}
    sequences |= {"mid_batch": tiles, "mid_batch_m": tiles, "mid_batch_n": tiles}
    sequences |= {"mid_start": tiles, "mid_start_m": tiles, "mid_start_n": tiles}
    of_keys, of_queries = backward_configs(HEAD_DIM)

    forward = padded._fwd_kernel_deberta_disentangled_attention
    kernels = [
        ("forward", forward, forward_config(HEAD_DIM)),
        ("backward dq", padded._bwd_q_dise_kernel, of_queries),
        ("backward dkv", padded._bwd_kv_dise_kernel, of_keys),
    ]
    packed_forward = packed._fwd_kernel_deberta_disentangled_attention
    packed_kernels = [
        ("packed forward", packed_forward, forward_config(HEAD_DIM)),
        ("packed backward dq", packed._bwd_q_dise_kernel_varlen, of_queries),
        ("packed backward dkv", packed._bwd_kv_dise_kernel_varlen, of_keys),
    ]
    tokens, columns = BATCH * length, plan.num_columns
    layouts = [(kernels, lengths, (BATCH, HEADS, length), (HEADS, BATCH, length, columns))]
    if length >= 1024:
        layouts.append((packed_kernels, sequences, (tokens, HEADS), (HEADS, tokens, columns)))
    for group, own, size, band_size in layouts:
        x, scores = tensor(*size, HEAD_DIM), tensor(*size, 2 * RULE.span)
        if own is sequences:
            scores = tensor(HEADS, tokens, 2 * RULE.span).transpose(0, 1)
        rows, band = tensor(*size, dtype=torch.float32), tensor(*band_size)
        tensors = dict.fromkeys(("Q", "K", "V", "O", "DO", "DQ", "DK", "DV"), x)
        tensors |= {"K_POS": scores, "Q_POS": scores, "L": rows, "Delta": rows}
        tensors |= {"C2P_BAND": band, "P2C_BAND": band}
        strides = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), x)
        strides |= {"pk": scores, "pq": scores, "band": band}
        for what, kernel, (block_m, block_n, num_stages, num_warps) in group:
            taken = arguments(kernel, {**common, **own, **tensors}, strides)
            yield Launch(what, kernel, taken, block_m, block_n, num_warps, num_stages)


PEERS: dict[str, Callable[[str, int], Iterator[Launch]]] = {
    "disentangled-flash": disentangled_flash,
    "flashdeberta": flashdeberta,
}


NOTES = {
    "disentangled-flash": "Schedules of its heuristic, which serves where no stored profile fits.",
    "flashdeberta": (
        "Its kernels take sequence lengths, with or without padding; from length 1024 on, padded "
        "batches go to the packed ones."
    ),
}


def main_loop(compiled: Compiled) -> Loop:
    """The loop over tiles: the one with most matrix instructions."""
    return max(compiled.loops, key=lambda loop: loop.matrix)


def instructions_per_element(package: str, what: str, target: str, length: int = 512) -> float:
    """Instructions of all threads for each score, in the loop of a rival's kernel."""
    launch = next(x for x in PEERS[package](target, length) if x.what == what)
    compiled = launch.compile(target)
    return compiled.per_element(main_loop(compiled).total, launch.block_m * launch.block_n)


def whole_call_instructions(per_element: float, length: int) -> float:
    """Instructions of a warp in the loops of a whole call, for one head of one sequence.

    The rivals take every pair of tokens the same way, near or far: length**2 scores.
    """
    return per_element * length**2 / 32


COLUMNS = (
    "kernel",
    "length",
    "tile",
    "warps",
    "stages",
    "registers",
    "spills st/ld",
    "shared, bytes",
    "instructions a score",
    "scalar loads a score",
    "scalar stores a score",
    "exp a score",
    "matrix instructions in the loop",
    "atomics",
)


def row(launch: Launch, length: int, target: str) -> str:
    compiled = launch.compile(target)
    loop, elements = main_loop(compiled), launch.block_m * launch.block_n

    def per_score(count: int) -> str:
        return f"{compiled.per_element(count, elements):.2f}"

    cells = [
        launch.what,
        length,
        f"{launch.block_m}x{launch.block_n}",
        launch.num_warps,
        launch.num_stages,
        compiled.registers,
        f"{compiled.spill_stores}/{compiled.spill_loads}",
        compiled.shared,
        f"{compiled.per_element(loop.total, elements):.1f}",
        per_score(loop.scalar_loads),
        per_score(loop.scalar_stores),
        per_score(loop.exp),
        f"{loop.matrix} {'/'.join(compiled.matrix)}",
        compiled.atomics,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def table(package: str, target: str) -> Iterator[str]:
    """A row for each kernel at the shortest length, and at longer ones that change its schedule."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{' --- |' * len(COLUMNS)}"
    seen = set()
    for length in LENGTHS:
        for launch in PEERS[package](target, length):
            if launch.schedule not in seen:
                seen.add(launch.schedule)
                yield row(launch, length, target)


def report(targets: list[str]) -> Iterator[str]:
    missing, versions = {}, {}
    for package, launches in PEERS.items():
        try:
            next(launches(targets[0], LENGTHS[0]))
            versions[package] = version(package)
        except ImportError as error:
            missing[package] = error
    named = ", ".join(f"{k} {v}" for k, v in versions.items())
    yield f"{named or 'No rival'}; triton {triton.__version__}; compiled offline, nothing was run."
    yield f"Head dimension {HEAD_DIM}, bf16, {BATCH} sequences of {HEADS} heads."
    for package, error in missing.items():
        yield f"{package} left out: {error}."
    yield ""
    yield "Counts a score are instructions in the loop over tiles, those of all threads, over the"
    yield "scores of a tile. A scalar load or store moves at most 4 bytes a thread."
    for target in targets:
        for package in versions:
            yield from (
                "",
                f"## {package}, {target}",
                "",
                NOTES[package],
                "",
                *table(package, target),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="sm_80,sm_90", help=f"of {', '.join(DEVICES)}")
    parser.add_argument("--out", type=Path, help="a file for the report (default: print it)")
    options = parser.parse_args()
    targets = options.targets.split(",")
    if unknown := [target for target in targets if target not in DEVICES]:
        parser.error(f"unknown targets: {', '.join(unknown)}; there are {', '.join(DEVICES)}")
    text = "\n".join(("# Resources of the rivals' kernels", "", *report(targets), ""))
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
