"""Registers, spills, shared memory and instructions of every CUDA kernel, with what calls cost.

    python -m benchmarks.cuda_resources [--targets sm_80,sm_90] [--out FILE] [--check]

nvcc compiles csrc/cuda for GPUs that need not be there; a host program records what the launchers
start; benchmarks.cuda_cost counts cycles of a tile. Nothing runs on a GPU: these are counts, not
times. --check compares with the limits below, status 1 past one; where there is no nvcc it says so
and passes.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import cuda_cost
from .cuda_calls import A100, H100, ROOT, Call, Launch, Recorder, cuda_home, find_cuda, run

SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# setup.py's, less what concerns torch and the compiler of the host.
NVCC_FLAGS = ["-O3", "-std=c++17"]

# Bytes that a kernel may store to local memory, by target: these variants do, all others may not.
# (kernel, head dim, position terms), as Variant has them. Other targets have the larger limit.
SPILLS: dict[tuple[str, int, bool | None], dict[str, int]] = {
    ("side_kernel of keys", 64, True): {"sm_80": 60, "sm_90": 0},
    ("side_kernel of keys", 128, True): {"sm_80": 76, "sm_90": 100},
    ("table_kernel", 128, None): {"sm_80": 4, "sm_90": 4},
}
# Registers of a thread, head dim 64, with terms; launch bounds let none take more than 255.
REGISTERS = {"forward_kernel, 16 rows a warp": 200, "side_kernel of queries": 240}
# Blocks of a multiprocessor, head dim 64, with terms: fewer could not hide each other's waits.
BLOCKS = {
    ("forward_kernel, 16 rows a warp", "sm_80"): 2,
    ("forward_kernel, 16 rows a warp", "sm_90"): 2,
    ("forward_kernel, 32 rows a warp", "sm_90"): 2,  # on sm_80 they are not taken
}
# Cycles of a tile as multiples of plain attention's. The goal for near tiles is 2.4: tiles of 16
# rows a warp miss it, and have what they reach for a limit.
GOAL = 2.4
NEAR = {16: 2.6, 32: GOAL}  # by rows a warp
FAR = 1.1
# Megabytes that a forward call moves to and from memory, by (batch, heads, length).
MEGABYTES = {(4, 12, 512): 20, (2, 12, 2048): 35, (2, 12, 8192): 115}


@dataclass(frozen=True)
class Gpu:
    """What the blocks of a multiprocessor share, and what one of them may have at most."""

    shared: int  # KiB of a multiprocessor
    shared_of_block: int  # KiB
    warps: int
    blocks: int


GPUS = {
    "sm_80": Gpu(164, 163, 64, 32),
    "sm_86": Gpu(100, 99, 48, 16),
    "sm_89": Gpu(100, 99, 48, 24),
    "sm_90": Gpu(228, 227, 64, 32),
}
REGISTERS_OF_MULTIPROCESSOR = 64 << 10
RESERVED = 1 << 10  # bytes of shared memory that every block takes besides its own


def blocks_that_fit(gpu: Gpu, registers: int, threads: int, shared_bytes: int) -> int:
    """How many blocks of a kernel a multiprocessor holds at once."""
    if shared_bytes > gpu.shared_of_block << 10:
        return 0
    warps = -(-threads // 32)
    # A warp gets registers in units of 256, from the quarter of them that its scheduler has.
    registers_of_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (REGISTERS_OF_MULTIPROCESSOR // 4 // registers_of_warp) // warps
    taken = -(-shared_bytes // 128) * 128 + RESERVED
    return min(by_registers, (gpu.shared << 10) // taken, gpu.warps // warps, gpu.blocks)


@dataclass(frozen=True)
class Variant:
    """An instantiation of a kernel, read from its symbol."""

    kernel: str
    dtype: str
    head_dim: int = 0  # 0: any
    positions: bool | None = None  # None: the kernel has no other form

    @staticmethod
    def of(symbol: str) -> "Variant":
        """Raises ValueError where the symbol is not that of a kernel of this library."""
        found = re.match(r"_ZN11fastdeberta4cuda\d+([a-z]+_kernel)I(.*?)EEvNS", symbol)
        if not found:
            raise ValueError(f"no kernel of csrc/cuda: {symbol}")
        name, arguments = found.groups()
        numbers = [int(n) for n in re.findall(r"Li(\d+)E", arguments)]
        flags = re.findall(r"Lb([01])E?", arguments)
        if side := re.search(r"SideE(\d)E", arguments):
            name += " of keys" if side[1] == "1" else " of queries"
        if name == "forward_kernel":
            name += f", {16 * numbers[1]} rows a warp"
        dtype = "float16" if "6__half" in arguments else "bfloat16"
        return Variant(
            name, dtype, numbers[0] if numbers else 0, flags[0] == "1" if flags else None
        )

    @property
    def key(self) -> tuple[str, int, bool | None]:
        return self.kernel, self.head_dim, self.positions

    @property
    def form(self) -> str:
        return {True: "terms", False: "content only", None: "-"}[self.positions]


@dataclass(frozen=True)
class Assembled:
    """What ptxas says of a kernel, in registers of a thread and bytes of one."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


PTXAS = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'\n.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


def parse_ptxas(log: str) -> dict[str, Assembled]:
    """By symbol, from the output of ptxas -v."""
    return {
        symbol: Assembled(int(registers), *map(int, memory))
        for symbol, _, *memory, registers in PTXAS.findall(log)
    }


COUNTED = ("HMMA", "LDSM", "LDGSTS", "LDS", "STS", "MUFU", "BAR", "STL", "LDL")


@dataclass(frozen=True)
class Code:
    """Instructions by kind, of a whole kernel and of its loop over tiles (empty: it has none)."""

    whole: Counter[str]
    loop: Counter[str]


def code_of(cubin: Path) -> dict[str, Code]:
    """By symbol, from the machine code."""
    from . import sass  # Not everywhere where this module's tests run does it import.

    assembly = subprocess.run(
        [disassembler(), "-sass", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    found = {}
    for section in re.split(r"Function : ", assembly)[1:]:
        code = [
            sass.Instruction(int(address, 16), name, operands.strip(), bool(guard))
            for address, guard, name, operands in sass.LINE.findall(section)
        ]
        found[section.split(None, 1)[0]] = Code(count(code), count(tile_loop(code)))
    return found


def disassembler() -> str:
    from . import sass

    return shutil.which("cuobjdump", path=f"{cuda_home()}/bin") or str(sass.CUOBJDUMP)


def missing() -> str | None:
    """Why nothing can be compiled and looked into here, if so."""
    if not find_cuda():
        return "there is no nvcc: put it on PATH or set CUDA_HOME"
    try:
        program = disassembler()
    except ImportError as error:
        return f"benchmarks.sass, which reads machine code, cannot be imported: {error}"
    return None if Path(program).exists() else "there is no cuobjdump, in the toolkit or in triton"


def tile_loop(code: list) -> list:
    """The innermost loop that has all products: every kernel makes these tile by tile."""
    from . import sass

    products = {n for n, instruction in enumerate(code) if instruction.kind == "HMMA"}
    if not products:
        return []
    return [code[n] for n in min((b for b in sass.loops(code) if products <= b), key=len)]


def count(code: Iterable) -> Counter[str]:
    # ptxas puts loads that nothing executes before copies to shared memory.
    real = [i for i in code if not (i.kind == "LDS" and i.operands.startswith("RZ,"))]
    return Counter({"all": len(real)}) + Counter(i.kind for i in real)


@dataclass(frozen=True)
class Kernel:
    """One kernel on one target."""

    target: str
    variant: Variant
    launch: Launch
    assembled: Assembled
    code: Code

    @property
    def blocks(self) -> int:
        where = self.launch
        return blocks_that_fit(
            GPUS[self.target], self.assembled.registers, where.threads, where.shared_bytes
        )

    @property
    def limited_by(self) -> str:
        """What keeps another block from a multiprocessor."""
        gpu, where = GPUS[self.target], self.launch
        free = blocks_that_fit(gpu, self.assembled.registers, where.threads, 0)
        return "registers" if free <= self.blocks else "shared memory"

    @property
    def numbers(self) -> tuple:
        """Cells of the table."""
        a, loop = self.assembled, self.code.loop
        spills = f"{a.spill_stores}/{a.spill_loads}"
        counts = (loop[kind] or "-" for kind in ("all", *COUNTED[:-2]))
        return (a.registers, spills, a.stack, self.launch.shared_bytes, self.blocks, *counts)


def compile_kernels(source: Path, target: str, directory: Path) -> tuple[str, dict, dict]:
    cubin = directory / f"{source.stem}.{target}.cubin"
    flags = [*NVCC_FLAGS, f"-arch={target}", "-Xptxas=-v", "-cubin"]
    log = run(cuda_home() / "bin/nvcc", *flags, "-o", cubin, source)
    assembled = parse_ptxas(log)
    return target, assembled, code_of(cubin) if assembled else {}


def collect(targets: list[str]) -> tuple[list[Kernel], list[Call]]:
    """Every kernel on every target, and the calls of MEGABYTES."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        recorder = Recorder(directory)
        launches = recorder.launches()
        calls = [recorder(shape, device=gpu) for gpu in (A100, H100) for shape in MEGABYTES]
        jobs = [(source, target, directory) for target in targets for source in SOURCES]
        # A compiler takes hundreds of megabytes and a core.
        with ThreadPoolExecutor(2) as pool:
            compiled = list(pool.map(lambda job: compile_kernels(*job), jobs))
    kernels = [
        Kernel(target, Variant.of(symbol), launches[symbol], part, code[symbol])
        for target, assembled, code in compiled
        for symbol, part in assembled.items()
    ]
    kernels.sort(key=lambda k: (k.target, k.variant.kernel, -(k.variant.positions or 0)))
    return kernels, calls


@dataclass(frozen=True)
class Cost:
    """A tile of a kernel near and far; table_kernel has none far."""

    kernel: str
    tile: str
    shared_bytes: int
    near: list[cuda_cost.Part]
    far: list[cuda_cost.Part]

    @cached_property
    def near_total(self) -> cuda_cost.Part:
        return cuda_cost.total(self.near)

    @cached_property
    def far_total(self) -> cuda_cost.Part:
        return cuda_cost.total(self.far)


def costs() -> list[Cost]:
    """Tiles of all kernels with head dim 64."""
    found = []
    for tiles in (1, 2):
        layout = cuda_cost.Layout(tiles)
        found.append(
            Cost(
                f"forward_kernel, {16 * tiles} rows a warp",
                f"{layout.block_m} x 64",
                cuda_cost.forward_shared_bytes(layout),
                list(cuda_cost.forward_tile(layout, near=True)),
                list(cuda_cost.forward_tile(layout, near=False)),
            )
        )
    for keys in (False, True):
        near, far = (list(cuda_cost.side_tile(keys, n)) for n in (True, False))
        name = f"side_kernel of {'keys' if keys else 'queries'}"
        found.append(Cost(name, "64 x 64", cuda_cost.side_shared_bytes(), near, far))
    table = list(cuda_cost.table_tile())
    found.append(Cost("table_kernel", "64 x 64", cuda_cost.table_shared_bytes(), table, []))
    return found


def past_resources(kernels: Iterable[Kernel]) -> Iterator[str]:
    for k in kernels:
        v, a, gpu = k.variant, k.assembled, GPUS[k.target]
        where = f"{k.target}: {v.kernel}, {v.dtype}, head dim {v.head_dim or 'any'}, {v.form}"
        limits = SPILLS.get(v.key, {})
        allowed = limits.get(k.target, max(limits.values(), default=0))
        if a.spill_stores > allowed:
            yield f"{where}: {a.spill_stores} bytes spilled, limit {allowed}"
        if k.launch.shared_bytes > gpu.shared_of_block << 10:
            yield f"{where}: {k.launch.shared_bytes} bytes of shared memory do not fit a block"
        if v.head_dim != 64 or v.positions is False:
            continue
        limit = REGISTERS.get(v.kernel, 255)
        if a.registers > limit:
            yield f"{where}: {a.registers} registers, limit {limit}"
        wanted = BLOCKS.get((v.kernel, k.target), 0)
        if k.blocks < wanted:
            yield f"{where}: {k.blocks} blocks a multiprocessor, wanted {wanted}"


def past_model(kernels: Iterable[Kernel], found: Iterable[Cost]) -> Iterator[str]:
    """Where the cost model describes other code than was compiled."""
    by_name = {cost.kernel: cost for cost in found}
    for k in kernels:
        v, loop = k.variant, k.code.loop
        if v.head_dim != 64 or v.kernel not in by_name:
            continue
        cost = by_name[v.kernel]
        part = cost.far_total if v.positions is False else cost.near_total
        where = f"{k.target}: {v.kernel}, {v.dtype}, {v.form}"
        counted = {"HMMA": part.code_mma, "LDSM": part.code_ldmatrix}
        for kind, expected in counted.items():
            if loop[kind] != expected:
                yield f"{where}: {loop[kind]} {kind} in the loop, the cost model has {expected}"
        if v.positions is not False and k.launch.shared_bytes != cost.shared_bytes:
            has = f"{k.launch.shared_bytes} bytes of shared memory"
            yield f"{where}: {has}, the cost model has {cost.shared_bytes}"


def past_ratios(near: Mapping[int, float] = NEAR, far: float = FAR) -> Iterator[str]:
    for rows, limit_near in near.items():
        limits = limit_near, far
        found = zip(("near", "far"), cuda_cost.ratios(rows // 16), limits, strict=True)
        for what, ratio, limit in found:
            if ratio > limit:
                where = f"forward_kernel, {rows} rows a warp"
                yield f"{where}: a {what} tile takes {ratio:.2f} of plain's cycles, limit {limit}"


def past_memory(calls: Iterable[Call]) -> Iterator[str]:
    for call in calls:
        shape = call.batch, call.heads, call.length
        megabytes = call.forward_memory() / 1e6
        if megabytes > MEGABYTES[shape]:
            where = f"{call.device.name}, forward, {shape}"
            yield f"{where}: {megabytes:.1f} MB, limit {MEGABYTES[shape]}"


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    header = list(header)
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"


INTRODUCTION = """\
# Resources of the CUDA kernels

csrc/cuda compiled by nvcc {version} with `{flags}` for {targets}.
Nothing was run: these are counts, not times. `python -m benchmarks.cuda_resources --out FILE`
writes this file, and `--check` compares with the limits in that module.

## Against the limits
"""

COSTS = """
## Cycles of a tile, counted

One multiprocessor, one tile of one head with head dim 64, all four warps of a block, at an A100's
rates: 1024 multiply-adds, one wavefront of 128 bytes of shared memory and 16 exponentials a cycle.
Wavefronts come from the simulated addresses of every access (ldmatrix, cp.async, strips and their
diagonals), bank conflicts included. The bound is the largest of the three: no latency, no other
arithmetic, no shuffles, no traffic beyond shared memory. Products and ldmatrix of the model are
those found in the compiled loops.

Plain is the inner loop of FlashAttention-2 for the same scores with as many warps and rows a warp:
queries in registers, keys and values copied to shared memory once and read by every warp.
"""

COST_NOTES = f"""
- The goal for near tiles of forward_kernel is {GOAL} x plain. **With 16 rows a warp it is missed**:
  shared memory bounds these tiles, of which a warp reads all keys, all values and its part of the
  bands for half as many rows. Their limit is what they reach, rounded up. They are used where 32
  rows a warp cannot be: with dropout, whose generator takes the registers; for head dims 96 and
  128; for sequences of at most 64 rows, and where blocks of 128 would leave multiprocessors idle;
  and where two of the larger blocks do not fit a multiprocessor: with head dim 64 and terms they
  take the 228 KiB of sm_90, and sm_80 has 164.
- These are an A100's rates. Tensor cores of sm_90 are nominally twice as fast, with no more traffic
  of shared memory: near tiles with 32 rows a warp would take
  {cuda_cost.ratios(2, 2)[0]:.2f} x plain if products ran at that rate.
- `x plain`: the bound over plain's. For side_kernel, over its own far tile's, which is what it
  takes without terms; table_kernel meets near tiles alone.
- `conflicts`: wavefronts of shared memory, of those counted, that bank conflicts cost.
- Far tiles cost what plain ones do: their terms go to the queries and to one number a row, once for
  a run of tiles.

Steps of the near tiles, shared (matrix):
"""

MEMORY = """
## Megabytes of a call, counted from the launch

bfloat16, head dim 64, both terms, tables of 512 rows. `memory` assumes that every kernel reads each
of its inputs once and writes each result once: blocks of one head that read the same keys, values
and table rows find them in the L2 cache. `L2` is what the blocks ask for without that assumption,
from the tiles that each of them meets. The backward pass includes its workspace.
"""

TARGET = """
## {target}

Registers are a thread's; spills are bytes that a thread stores/loads; stack is a thread's, shared
memory a block's, in bytes; blocks are those that fit a multiprocessor at once. The rest are
instructions in the code of the loop over tiles: near and far tiles share it, and inner loops that
are not unrolled count once. `terms` are kernels with position terms.
"""

SPILLED = """
## Where the spills stand

Instructions to and from local memory inside the loop over tiles, of all in the kernel. Those
outside run once for a run of tiles.
"""


def report(kernels: list[Kernel], calls: list[Call]) -> Iterator[str]:
    release = re.search(r"release [\d.]+, V([\d.]+)", run(cuda_home() / "bin/nvcc", "--version"))
    targets = list(dict.fromkeys(k.target for k in kernels))
    yield INTRODUCTION.format(
        version=release[1] if release else "of unknown version",
        flags=" ".join(NVCC_FLAGS),
        targets=" and ".join(targets),
    )
    yield from report_limits(kernels, calls)
    yield COSTS
    yield from report_costs(costs())
    yield COST_NOTES
    yield from report_steps(costs())
    yield MEMORY
    yield from report_memory(calls)
    for target in targets:
        yield TARGET.format(target=target)
        yield from report_target([k for k in kernels if k.target == target])
    yield SPILLED
    yield from report_spills([k for k in kernels if k.assembled.spill_stores])


def report_limits(kernels: list[Kernel], calls: list[Call]) -> Iterator[str]:
    failures = list(violations(kernels, calls))
    yield from (f"- **Past a limit**: {failure}." for failure in failures)
    if not failures:
        yield "- All limits hold."
    missed = [rows for rows in NEAR if cuda_cost.ratios(rows // 16)[0] > GOAL]
    for rows in missed:
        ratio = cuda_cost.ratios(rows // 16)[0]
        yield (
            f"- The goal of {GOAL} for near tiles is missed with {rows} rows a warp: {ratio:.2f} of"
            " plain's cycles. Why they are used nevertheless: below."
        )
    spilling = sum(k.assembled.spill_stores > 0 for k in kernels)
    yield f"- {len(kernels) - spilling} of {len(kernels)} kernels spill nothing; the others: below."
    for k in kernels:
        v = k.variant
        if v.kernel.startswith("forward") and v.key[1:] == (64, True) and v.dtype == "bfloat16":
            yield (
                f"- {k.target}, {v.kernel}, head dim 64: {k.assembled.registers} registers and"
                f" {k.launch.shared_bytes} bytes of shared memory; blocks a multiprocessor:"
                f" {k.blocks}, for another there is too little of {k.limited_by}."
            )
    for device in dict.fromkeys(call.device for call in calls):
        sizes = {call.rows_of_block // cuda_cost.WARPS for call in calls if call.device == device}
        taken = " or ".join(map(str, sorted(sizes)))
        yield f"- {device.name}: the calls counted below take {taken} rows a warp."


def report_costs(found: list[Cost]) -> Iterator[str]:
    rows: list[tuple] = []

    def row(name: str, tile: str, part: cuda_cost.Part, ratio: str) -> None:
        cells = (part.matrix, part.shared, part.special, part.bound, part.conflicts)
        rows.append((name, tile, *(f"{c:.0f}" for c in cells), ratio))

    for tiles, cost in zip((1, 2), found, strict=False):
        near, far = cuda_cost.ratios(tiles)
        row(f"plain, {16 * tiles} rows a warp", cost.tile, cuda_cost.plain_tile(tiles), "1.00")
        row(f"{cost.kernel}: far", cost.tile, cost.far_total, f"{far:.2f} (limit {FAR})")
        limit = NEAR[16 * tiles]
        row(f"{cost.kernel}: near", cost.tile, cost.near_total, f"{near:.2f} (limit {limit})")
    for cost in found[2:]:
        ratio = f"{cost.near_total.bound / cost.far_total.bound:.2f}" if cost.far else "-"
        if cost.far:
            row(f"{cost.kernel}: far", cost.tile, cost.far_total, "1.00")
        row(f"{cost.kernel}: near", cost.tile, cost.near_total, ratio)
    header = "tile", "scores", "matrix", "shared", "special", "bound", "conflicts", "x plain"
    yield from table(header, rows)


def report_steps(found: list[Cost]) -> Iterator[str]:
    steps = [{p.name: f"{p.shared:.0f} ({p.matrix:.0f})" for p in cost.near} for cost in found]
    names = [name for name in dict.fromkeys(n for step in steps for n in step)]
    names.remove("exponentials")
    rows = ((name, *(step.get(name, "-") for step in steps)) for name in names)
    yield from table(["step", *(cost.kernel for cost in found)], rows)


def report_memory(calls: list[Call]) -> Iterator[str]:
    rows = []
    for call in calls:
        shape = call.batch, call.heads, call.length
        blocks = sum(launch.blocks for launch in call.forward.values())
        numbers = (
            f"{call.forward_memory() / 1e6:.1f} (limit {MEGABYTES[shape]})",
            f"{call.forward_cache() / 1e6:.0f}",
            f"{call.backward_memory() / 1e6:.1f}",
            f"{call.backward_cache() / 1e6:.0f}",
            f"{call.workspace / 1e6:.1f}",
        )
        tile = f"{blocks} of {call.rows_of_block} queries"
        rows.append((", ".join(map(str, shape)), call.device.name, tile, *numbers))
    header = (
        "B, H, L", "GPU", "forward blocks", "forward: memory", "forward: L2", "backward: memory",
        "backward: L2", "workspace",
    )  # fmt: skip
    yield from table(header, rows)


def report_target(kernels: list[Kernel]) -> Iterator[str]:
    header = (
        "kernel", "type", "head dim", "form", "registers", "spills", "stack", "shared", "blocks",
        "instructions", *COUNTED[:-2],
    )  # fmt: skip
    by_row: dict[tuple, list[str]] = {}
    for k in kernels:
        v = k.variant
        cells = (v.kernel, v.head_dim or "any", v.form, *k.numbers)
        by_row.setdefault(cells, []).append(v.dtype)
    rows = (
        (name, "both" if len(types) > 1 else types[0], *rest)
        for (name, *rest), types in by_row.items()
    )
    yield from table(header, rows)


def report_spills(kernels: list[Kernel]) -> Iterator[str]:
    rows = []
    for k in kernels:
        v, code = k.variant, k.code
        inside = (f"{code.loop[n]} of {code.whole[n]}" for n in ("STL", "LDL"))
        name = (k.target, v.kernel, v.dtype, v.head_dim, v.form)
        rows.append((*name, k.assembled.spill_stores, *inside))
    header = ("target", "kernel", "type", "head dim", "form", "bytes stored", "stores", "loads")
    yield from table(header, rows) if rows else ["Nothing spills."]


def violations(kernels: list[Kernel], calls: list[Call]) -> Iterator[str]:
    yield from past_resources(kernels)
    yield from past_model(kernels, costs())
    yield from past_ratios()
    yield from past_memory(calls)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--targets", default="sm_80,sm_90", help=f"of {', '.join(GPUS)}")
    parser.add_argument("--out", type=Path, help="write the report here instead of showing it")
    parser.add_argument("--check", action="store_true", help="fail past a limit")
    options = parser.parse_args()
    targets = options.targets.split(",")
    if unknown := [target for target in targets if target not in GPUS]:
        parser.error(f"--targets must be of {', '.join(GPUS)}, not {', '.join(unknown)}")
    if reason := missing():
        if options.out or not options.check:
            parser.exit(1, f"{reason}\n")
        print(f"nothing checked: {reason}")
        return 0
    kernels, calls = collect(targets)
    text = "\n".join(report(kernels, calls)) + "\n"
    if options.out:
        options.out.write_text(text)
    elif not options.check:
        print(text, end="")
    failures = list(violations(kernels, calls)) if options.check else []
    print(*failures, sep="\n", end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
