"""Triton kernels compiled for a GPU that need not be there, and what the compiler made of them.

    compiled = compile(kernel, {"query": tensor, "stride": 64, "BLOCK": 64}, "sm_90", num_warps=4)
    compiled.registers, compiled.spill_stores, [loop.total for loop in compiled.loops]

Nothing is run: every figure is a count of instructions in the machine code, as one warp meets them.
"""

import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"):
    raise RuntimeError(
        "benchmarks.sass compiles kernels, and Triton's interpreter replaces its compiler: "
        "unset TRITON_INTERPRET, which is read when triton is imported"
    )

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# A loop this short that polls a barrier or retries an exchange waits for others: it is no work.
WAIT_LENGTH = 24


@dataclass(frozen=True)
class Counts:
    """Instructions by what they do; a load or store is scalar up to 4 bytes a thread."""

    total: int = 0
    matrix: int = 0
    exp: int = 0
    scalar_loads: int = 0
    wide_loads: int = 0
    scalar_stores: int = 0
    wide_stores: int = 0
    atomics: int = 0
    shared: int = 0
    shuffles: int = 0
    barriers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def stores(self) -> int:
        """Stores to global memory of any width."""
        return self.scalar_stores + self.wide_stores


@dataclass(frozen=True)
class Loop(Counts):
    """The body of an innermost loop, once through.

    Both sides of a branch count. A body that ptxas unrolled holds several tiles: `matrix` over the
    matrix instructions of one tile says how many.
    """

    address: int = 0


@dataclass(frozen=True)
class Compiled:
    """What a kernel became on one target.

    `spill_stores` and `spill_loads` count instructions that spill to memory, `shared` is in bytes,
    `matrix` maps each kind of matrix instruction to its count, and `seconds` is the time to
    compile, next to nothing where Triton's cache held the kernel. `loops` are innermost, in the
    order of their addresses. On AMD targets `loops` is empty and `whole` counts only matrix
    instructions, atomics and spills.
    """

    name: str
    target: str
    num_warps: int
    num_stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    atomics: int
    matrix: dict[str, int]
    loops: list[Loop]
    whole: Counts
    seconds: float
    assembly: str = field(repr=False)

    def per_element(self, count: float, elements: int) -> float:
        """Instructions of one thread for each of a tile's `elements`.

        `count` is what one warp issues for the tile, as in `loops`; every warp has its own share.
        """
        return count * self.num_warps * TARGETS[self.target].warp_size / elements


def compile(kernel: Any, arguments: Mapping[str, Any], target: str, **options: Any) -> Compiled:
    """Compiles a @triton.jit function as a launch with `arguments` would on `target`.

    `arguments` maps each parameter without a default to a sample of its value. Of a tensor only
    the dtype counts: its address is taken as divisible by 16. Other values are specialised by the
    rules of a launch. `options` are those of a launch too (num_warps, num_stages, maxnreg, ...).

    Raises ValueError for an unknown target and TypeError for names that are not the kernel's.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, not {target!r}")
    function = unwrap(kernel)
    check_names(function, arguments)
    backend = make_backend(TARGETS[target])
    options = {"enable_fp_fusion": True, **options}
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, _ = bind(**{name: sample(value) for name, value in arguments.items()})
    parsed, signature, constants, attributes = function._pack_args(
        backend, options, bound, specialization, options
    )
    source = ASTSource(function, signature, constants, attributes)
    start = time.perf_counter()
    built = triton.compile(source, target=TARGETS[target], options=parsed.__dict__)
    seconds = time.perf_counter() - start
    found = read_sass(built) if TARGETS[target].backend == "cuda" else read_amdgcn(built)
    return Compiled(
        name=function.__name__,
        target=target,
        num_warps=built.metadata.num_warps,
        num_stages=built.metadata.num_stages,
        spill_stores=found["whole"].spill_stores,
        spill_loads=found["whole"].spill_loads,
        shared=built.metadata.shared,
        atomics=found["whole"].atomics,
        seconds=seconds,
        **found,
    )


def unwrap(kernel: Any) -> JITFunction:
    """The function under @triton.autotune and @triton.heuristics, whose choices are not made."""
    while not isinstance(kernel, JITFunction):
        if not hasattr(kernel, "fn"):
            raise TypeError(f"kernel must be a @triton.jit function, not {type(kernel).__name__}")
        kernel = kernel.fn
    return kernel


def check_names(function: JITFunction, arguments: Mapping[str, Any]) -> None:
    missing = [p.name for p in function.params if not p.has_default and p.name not in arguments]
    unknown = [name for name in arguments if name not in function.arg_names]
    if missing or unknown:
        problems = [
            f"{what} {', '.join(names)}"
            for what, names in (("without a value:", missing), ("unknown:", unknown))
            if names
        ]
        raise TypeError(f"arguments of {function.__name__} {'; '.join(problems)}")


def sample(value: Any) -> Any:
    """A stand-in that has no address, for a tensor."""
    return MockTensor(value.dtype) if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: `name` is its opcode with modifiers, as LDG.E.128."""

    address: int
    name: str
    operands: str
    guarded: bool

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.name.split(".")[1:]

    @property
    def scalar(self) -> bool:
        return not {"64", "128", "256"} & set(self.modifiers)


LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([\w.]+)(.*?);", re.MULTILINE)
MATRIX = re.compile(r"(UTC)?[BDHIOQ]G?MMA")


def read_sass(built: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(built.asm["cubin"])
        command = [str(CUOBJDUMP), "-res-usage", "-sass", str(cubin)]
        assembly = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Functions that were not inlined have sections, and addresses, of their own.
    name = re.escape(built.metadata.name)
    section = re.split(rf"Function : {name}\s", assembly)[1].partition("Function :")[0]
    code = [
        Instruction(int(address, 16), name, operands.strip(), bool(guard))
        for address, guard, name, operands in LINE.findall(section)
    ]
    return {
        "registers": int(re.search(rf"Function {name}:\s+REG:(\d+)", assembly)[1]),
        "matrix": dict(Counter(i.name for i in code if MATRIX.fullmatch(i.kind))),
        "loops": [
            Loop(address=code[min(body)].address, **counts(code[i] for i in body))
            for body in inner_loops(code)
        ],
        "whole": Counts(**counts(code)),
        "assembly": assembly,
    }


def counts(code: Iterable[Instruction]) -> dict[str, int]:
    """The fields of Counts."""
    result = Counter({"total": 0})
    for instruction in code:
        result["total"] += 1
        if purpose := purpose_of(instruction):
            result[purpose] += 1
    return dict(result)


def purpose_of(instruction: Instruction) -> str | None:
    kind, width = instruction.kind, "scalar" if instruction.scalar else "wide"
    if MATRIX.fullmatch(kind):
        return "matrix"
    if kind in ("LDG", "LDGSTS", "LD"):  # LDGSTS copies to shared memory (cp.async)
        return f"{width}_loads"
    if kind in ("STG", "ST"):
        return f"{width}_stores"
    if kind in ("UTMALDG", "UBLKCP"):  # the copy engine's: one instruction for a whole tile
        return "wide_loads"
    if kind == "UTMASTG":
        return "wide_stores"
    if kind in ("ATOM", "ATOMG", "RED", "REDG", "UREDGR", "UTMAREDG", "UBLKRED"):
        return "atomics"
    if kind in ("LDS", "LDSM", "STS", "STSM", "ATOMS"):
        return "shared"
    if kind in ("BAR", "SYNCS"):
        return "barriers"
    if kind == "MUFU" and "EX2" in instruction.modifiers:
        return "exp"
    return {"SHFL": "shuffles", "STL": "spill_stores", "LDL": "spill_loads"}.get(kind)


def inner_loops(code: list[Instruction]) -> list[set[int]]:
    """Innermost loops that do work, each as the positions of its instructions."""
    bodies = loops(code)
    working = [b for b in bodies if not waits([code[i] for i in b])]
    return sorted((b for b in working if not any(o < b for o in working)), key=min)


def loops(code: list[Instruction]) -> list[set[int]]:
    """All loops, each as the positions of its instructions.

    A body is what can reach a backward edge without passing the loop's head: unlike a range of
    addresses, it is right where ptxas moves a wait out of the loop and jumps back from there.
    """
    successors = [successors_of(code, position) for position in range(len(code))]
    position_of = {instruction.address: i for i, instruction in enumerate(code)}
    edges = [[position_of[a] for a in s if a in position_of] for s in successors]
    back, reached = backward_edges(edges)
    sources: list[list[int]] = [[] for _ in code]
    for position in reached:
        for successor in edges[position]:
            sources[successor].append(position)
    bodies: dict[int, set[int]] = {}
    for tail, head in back:
        body = bodies.setdefault(head, {head})
        todo = [tail]
        while todo:
            position = todo.pop()
            if position not in body:
                body.add(position)
                todo += sources[position]
    return list(bodies.values())


def successors_of(code: list[Instruction], position: int) -> list[int]:
    """Addresses at which the warp may go on."""
    instruction = code[position]
    following = [i.address for i in code[position + 1 : position + 2]]
    if instruction.kind == "BRA":
        if "DIV" in instruction.modifiers:  # left only by a warp that has diverged
            return following
        target = int(re.findall(r"0x[0-9a-f]+", instruction.operands)[-1], 16)
        # Besides its guard, a branch may test a predicate given as an operand.
        conditional = instruction.guarded or "," in instruction.operands
        return [target, *following] if conditional else [target]
    if instruction.kind in ("EXIT", "RET", "KILL", "BRX", "JMP"):
        return following if instruction.guarded else []
    return following


def backward_edges(edges: list[list[int]]) -> tuple[list[tuple[int, int]], set[int]]:
    """Edges (tail, head) that close a loop, and all that is reached from the first instruction."""
    back, reached, path = [], {0}, {0}
    stack = [(0, iter(edges[0]))]
    while stack:
        position, rest = stack[-1]
        successor = next(rest, None)
        if successor is None:
            stack.pop()
            path.remove(position)
        elif successor in path:
            back.append((position, successor))
        elif successor not in reached:
            reached.add(successor)
            path.add(successor)
            stack.append((successor, iter(edges[successor])))
    return back, reached


def waits(body: list[Instruction]) -> bool:
    signs = {"TRYWAIT", "CAS", "CAST", "NANOSLEEP"}
    return len(body) <= WAIT_LENGTH and any(signs & set(i.name.split(".")) for i in body)


def read_amdgcn(built: Any) -> dict[str, Any]:
    assembly = built.asm["amdgcn"]
    names = Counter(re.findall(r"^\s+([a-z]\w+)", assembly, re.MULTILINE))

    def total(pattern: str) -> int:
        return sum(n for name, n in names.items() if re.match(pattern, name))

    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
        "matrix": {n: c for n, c in names.items() if re.match(r"v_s?(mfma|wmma)", n)},
        "loops": [],
        "whole": Counts(
            matrix=total(r"v_s?(mfma|wmma)"),
            atomics=total(r"(global|buffer|flat)_atomic"),
            spill_stores=total(r"scratch_store"),
            spill_loads=total(r"scratch_load"),
        ),
        "assembly": assembly,
    }
