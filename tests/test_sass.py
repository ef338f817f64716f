"""benchmarks.sass finds in machine code what was planted in kernels, for every target.

Run as a script, this file compiles those kernels: in a process of its own, since Triton either
compiles or interprets all that a process decorates.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
MATRIX_KINDS = {
    "sm_80": "HMMA.16816.F32.BF16",
    "sm_86": "HMMA.16816.F32.BF16",
    "sm_89": "HMMA.16816.F32.BF16",
    "sm_90": "HGMMA.64x64x16.F32.BF16",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA.16816.F32.BF16",
    "gfx942": "v_mfma_f32_32x32x8_bf16",
}
NVIDIA = [target for target in MATRIX_KINDS if target.startswith("sm_")]
GENERATIONS = ["sm_80", "sm_90", "sm_100", "sm_120"]  # sm_86 and sm_89 have sm_80's instructions.


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        env=inherited | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What came out: compiled[kernel, target], with loops as objects too."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    cache = str(tmp_path_factory.mktemp("cache"))
    done = run("-m", "tests.test_sass", TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout, object_hook=lambda fields: SimpleNamespace(**fields))
    return {(result.case, result.target): result for result in results}


@pytest.mark.parametrize("target", MATRIX_KINDS)
def test_matrix_instructions_of_a_product(compiled, target):
    assert list(vars(compiled["matmul", target].matrix)) == [MATRIX_KINDS[target]]
    assert compiled["matmul", target].registers > 0
    assert compiled["matmul", target].shared >= 2 * 64 * 32 * 2  # A tile of each operand.


@pytest.mark.parametrize("target", NVIDIA)
def test_the_loop_of_a_product(compiled, target):
    [loop] = [loop for loop in compiled["matmul", target].loops if loop.matrix]
    # A 64x64x32 product: warps share it as 16x8x16 pieces, 64x64x16 ones take a group of four.
    assert loop.matrix == (16 if MATRIX_KINDS[target].startswith("HMMA") else 2)
    assert loop.wide_loads == 4  # Two tiles of 4 KiB by 128 threads, 16 bytes each.
    assert loop.scalar_loads == loop.exp == loop.atomics == 0
    assert loop.shared > 0
    assert loop.barriers > 0
    assert loop.total > loop.matrix + loop.wide_loads + loop.shared + loop.barriers


@pytest.mark.parametrize("target", GENERATIONS)
def test_scattered_loads_are_scalar(compiled, target):
    loop = compiled["gather", target].loops[0]
    # Of 512 elements a thread loads four indices at once, then gathers four times. ptxas unrolls.
    assert loop.scalar_loads == 4 * loop.wide_loads
    assert compiled["gather", target].per_element == loop.scalar_loads * 128 / 512


@pytest.mark.parametrize("target", [*GENERATIONS, "gfx942"])
def test_atomics_are_counted(compiled, target):
    assert compiled["scatter", target].atomics > 0
    assert compiled["gather", target].atomics == compiled["matmul", target].atomics == 0


@pytest.mark.parametrize("target", GENERATIONS)
def test_spills_are_counted(compiled, target):
    spilling = compiled["few registers", target]
    assert spilling.registers <= 32
    assert spilling.spill_stores > 0
    assert spilling.spill_loads > 0
    assert compiled["registers", target].spill_stores == 0
    assert compiled["registers", target].spill_loads == 0


def test_spills_of_amd_are_counted(compiled):
    spilling = compiled["huge tile", "gfx942"]
    assert spilling.spill_stores > 0
    assert spilling.spill_loads > 0
    assert compiled["registers", "gfx942"].spill_stores == 0


@pytest.mark.parametrize("target", GENERATIONS)
def test_only_innermost_loops(compiled, target):
    loops = compiled["nested", target].loops
    assert loops
    # Each holds the inner exponential, once for each time that it is unrolled; none the outer's.
    assert all(loop.exp == loop.shuffles / 5 >= 1 for loop in loops)
    assert compiled["nested", target].whole.exp > sum(loop.exp for loop in loops)


@pytest.mark.parametrize(
    ("case", "wide"),
    [
        ("offset 16", True),
        ("offset 3", False),
        ("offset 16, unaligned", False),
        ("offset 16, unspecialised", False),
        ("stride 1", True),
        ("stride 2", False),
    ],
)
def test_arguments_are_specialised_as_by_a_launch(compiled, case, wide):
    whole = compiled[case, "sm_80"].whole
    assert bool(whole.wide_loads) == wide
    assert bool(whole.scalar_loads) != wide


def test_none_and_names_are_constants(compiled):
    assert compiled["without bias", "sm_80"].whole.wide_loads == 1
    assert compiled["with bias", "sm_80"].whole.wide_loads == 2


def test_errors_name_what_is_wrong(compiled):
    errors = compiled["errors", "sm_80"]
    assert errors.names == "arguments of copy without a value: out, offset; unknown: other"
    assert errors.unknown_target.endswith("gfx942, not 'sm_70'")
    assert errors.no_kernel == "kernel must be a @triton.jit function, not str"


def test_the_interpreter_is_refused():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = run("-c", "import benchmarks.sass", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "RuntimeError: benchmarks.sass compiles kernels" in done.stderr
    assert "unset TRITON_INTERPRET" in done.stderr


if __name__ == "__main__":
    import torch
    import triton
    import triton.language as tl

    from benchmarks.sass import compile

    @triton.jit
    def matmul(left, right, out, depth, SIZE: tl.constexpr, STEP: tl.constexpr):
        rows, steps = tl.arange(0, SIZE), tl.arange(0, STEP)
        total = tl.zeros([SIZE, SIZE], tl.float32)
        for start in range(0, depth, STEP):
            offsets = rows[:, None] * depth + start + steps[None, :]
            total = tl.dot(tl.load(left + offsets), tl.trans(tl.load(right + offsets)), total)
        tl.store(out + rows[:, None] * SIZE + rows[None, :], total)

    @triton.jit
    def gather(table, index, out, steps, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for step in range(steps):
            total += tl.load(table + tl.load(index + step * BLOCK + offsets))
        tl.store(out + offsets, total)

    @triton.jit
    def scatter(values, index, out, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        tl.atomic_add(out + tl.load(index + offsets), tl.load(values + offsets))

    @triton.jit
    def registers(values, out, steps, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        a, b = tl.load(values + offsets), tl.load(values + BLOCK + offsets)
        for _ in range(steps):
            a, b = a * b + 1, b - a
        tl.store(out + offsets, a + b)

    @triton.jit
    def nested(values, out, outer, inner):
        offsets = tl.arange(0, 32)
        total = tl.zeros([32], tl.float32)
        for i in range(outer):
            total = tl.exp2(total)
            for j in range(inner):
                total += tl.sum(tl.exp2(tl.load(values + i * 1000 + j * 32 + offsets)))
        tl.store(out + offsets, total)

    def copy(values, out, offset):
        offsets = tl.arange(0, 512)
        tl.store(out + offsets, tl.load(values + offset + offsets))

    def strided(values, out, stride, bias, DTYPE: tl.constexpr):
        offsets = tl.arange(0, 512)
        x = tl.load(values + offsets * stride)
        if bias is not None:
            x += tl.load(bias + offsets)
        tl.store(out + offsets, x.to(DTYPE))

    def message(*arguments):
        try:
            compile(*arguments)
        except (TypeError, ValueError) as error:
            return str(error)

    half, single, index = (
        torch.empty(0, dtype=dtype, device="meta")
        for dtype in (torch.bfloat16, torch.float32, torch.int32)
    )
    products = {"left": half, "right": half, "out": single, "depth": 64, "SIZE": 64, "STEP": 32}
    gathered = {"table": half, "index": index, "out": single, "steps": 8, "BLOCK": 512}
    scattered = {"values": single, "index": index, "out": single, "BLOCK": 512}
    held = {"values": single, "out": single, "steps": 8, "BLOCK": 1024}
    huge = held | {"BLOCK": 65536}
    moved = {"values": single, "out": single, "offset": 16}
    taken = {"values": single, "out": half, "stride": 1, "bias": None, "DTYPE": tl.bfloat16}

    results = []

    def case(name, target, kernel, arguments, **options):
        result = compile(kernel, arguments, target, **options)
        fields = dataclasses.asdict(result) | {"case": name}
        if name == "gather" and result.loops:
            fields["per_element"] = result.per_element(result.loops[0].scalar_loads, 512)
        del fields["assembly"]
        results.append(fields)

    for target in MATRIX_KINDS:
        case("matmul", target, matmul, products, num_stages=2)
    for target in [*GENERATIONS, "gfx942"]:
        case("gather", target, gather, gathered)
        case("scatter", target, scatter, scattered)
        case("registers", target, registers, held, num_warps=1)
    for target in GENERATIONS:
        sums = {"values": single, "out": single, "outer": 7, "inner": 9}
        case("nested", target, nested, sums, num_warps=1)
        case("few registers", target, registers, held, num_warps=1, maxnreg=32)
    case("huge tile", "gfx942", registers, huge)
    jit, case_80 = triton.jit, lambda name, *rest: case(name, "sm_80", *rest)
    case_80("offset 16", jit(copy), moved)
    case_80("offset 3", jit(copy), moved | {"offset": 3})
    case_80("offset 16, unaligned", jit(copy, do_not_specialize_on_alignment=["offset"]), moved)
    case_80("offset 16, unspecialised", jit(copy, do_not_specialize=["offset"]), moved)
    case_80("stride 1", jit(strided), taken)
    case_80("stride 2", jit(strided), taken | {"stride": 2})
    case_80("without bias", triton.autotune([triton.Config({})], [])(jit(strided)), taken)
    case_80("with bias", jit(strided), taken | {"bias": single})
    errors = {
        "case": "errors",
        "target": "sm_80",
        "names": message(jit(copy), {"values": single, "other": 1}, "sm_80"),
        "unknown_target": message(jit(copy), moved, "sm_70"),
        "no_kernel": message("copy", moved, "sm_80"),
    }
    print(json.dumps([*results, errors]))
