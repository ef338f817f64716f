"""What the CUDA launchers start for a call, recorded on the CPU, and the bytes that it moves.

record = Recorder(directory)                      # compiles the launchers with a C++ compiler
call = record((2, 12, 2048), device=A100)
call.forward, call.forward_memory(), call.forward_cache()
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .cases import RULE
from .cuda_cost import BLOCK_N
from .toolkit import find_toolkit

ROOT = Path(__file__).parent.parent
HEAD_DIMS = (32, 64, 96, 128)


@dataclass(frozen=True)
class Device:
    """What the launchers ask of a GPU."""

    name: str
    multiprocessors: int
    shared_bytes: int  # of a multiprocessor


A100 = Device("A100", 108, 164 << 10)
H100 = Device("H100", 132, 228 << 10)


@dataclass(frozen=True)
class Launch:
    blocks: int
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Tiles:
    """All tiles of one head of one sequence, met by blocks of so many rows."""

    near: int
    far: int
    runs: int  # rows are loaded this many times: for far, near and far tiles
    bands: int  # blocks with near tiles


@dataclass(frozen=True)
class Call:
    """What a call with both terms starts, and what it moves at least and at most."""

    device: Device
    batch: int
    heads: int
    length: int
    forward: dict[str, Launch]
    backward: dict[str, Launch]
    tiles: dict[tuple[str, int], Tiles]
    statistics: int  # bytes of the workspace: delta and shift of every query
    far: int  # bytes: gradients of the tables from far tiles
    near: int  # bytes: the same from near tiles
    head_dim: int = 64

    @property
    def tensor(self) -> int:
        """Bytes of one [T, H, D]."""
        return 2 * self.batch * self.heads * self.length * self.head_dim

    @property
    def row(self) -> int:
        """Bytes of a float32 for every query."""
        return 4 * self.batch * self.heads * self.length

    @property
    def tables(self) -> int:
        return 2 * 2 * 2 * RULE.span * self.heads * self.head_dim

    @property
    def rows_of_block(self) -> int:
        """Queries of a block of the forward kernel, if blocks are full."""
        (launch,) = self.forward.values()
        return self.batch * self.heads * self.length // launch.blocks

    @property
    def workspace(self) -> int:
        return self.statistics + self.far + self.near

    def forward_memory(self) -> int:
        """Bytes to and from memory if each input is read once, whatever its blocks."""
        return 4 * self.tensor + self.row + self.tables

    def forward_cache(self) -> int:
        """Bytes that blocks ask of the L2 cache."""
        met = self.streamed("queries", self.rows_of_block)
        return met + self.tensor + self.row

    def streamed(self, side: str, rows: int) -> int:
        """What blocks of one side read: their own rows, tiles of the other side, and bands."""
        t, row = self.tiles[side, rows], 2 * self.head_dim
        own = t.runs * rows * row
        tiles = (t.near + t.far) * 2 * BLOCK_N * row
        bands = 2 * (t.near * BLOCK_N + t.bands * rows) * row
        return self.batch * self.heads * (own + tiles + bands)

    def backward_memory(self) -> int:
        """The same as forward_memory, of every kernel of the backward pass."""
        x, row = self.tensor, self.row
        delta = 2 * x + row + self.statistics
        side = 4 * x + self.statistics + self.tables + self.far // 2
        table = 4 * x + self.statistics + self.tables + self.near
        fold = self.near + self.far + self.tables
        return delta + (side + x) + (side + 2 * x) + table + fold

    def backward_cache(self) -> int:
        x, row = self.tensor, self.row
        delta = 2 * x + row + self.statistics
        queries = self.streamed("queries", 64) + x + self.statistics + x
        keys, heads = self.streamed("keys", 64) + x + 2 * x, self.batch * self.heads
        tiles = self.tiles["keys", 64]
        keys += heads * (tiles.near + tiles.far) * 2 * 4 * BLOCK_N
        (blocks,) = (v.blocks for k, v in self.backward.items() if "table_kernel" in k)
        row_bytes = 2 * self.head_dim
        near = heads * self.tiles["queries", 64].near
        bands = blocks * 2 * 2 * BLOCK_N * row_bytes
        table = bands + near * BLOCK_N * (4 * row_bytes + 2 * 4) + self.near
        fold = self.near + 2 * self.far + self.tables
        return delta + queries + keys + table + fold


def find_cuda() -> Path | None:
    """The toolkit that has a compiler."""
    return find_toolkit("bin/nvcc")


def cuda_home() -> Path:
    home = find_cuda()
    if not home:
        raise SystemExit("there is no nvcc: put it on PATH or set CUDA_HOME")
    return home


def run(*command: str | Path, stdin: str | None = None) -> str:
    """Both outputs of a program, which ends this one if it fails."""
    done = subprocess.run(list(map(str, command)), input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stderr}")
    return done.stdout + done.stderr


class Recorder:
    """Asks the launchers, built for the CPU, what they would start."""

    def __init__(self, directory: Path) -> None:
        self.program = directory / "cuda_launches"
        flags = ["-std=c++17", "-O0", "-w", "-fno-strict-aliasing", "-rdynamic", "-pthread"]
        headers = ["-isystem", str(cuda_home() / "include")]
        sources = [ROOT / "benchmarks/cuda_launches.cpp", ROOT / "csrc/simt/simt.cpp"]
        compiler = os.environ.get("CXX", "g++")
        run(compiler, *flags, *headers, "-o", self.program, "-x", "c++", *sources, "-ldl")
        rows, first, last = RULE.table()
        self.rows = " ".join(map(str, [first, last, *rows.tolist()]))

    def __call__(
        self,
        shape: tuple[int, int, int],
        head_dim: int = 64,
        dtype: str = "bfloat16",
        terms: int = 2,
        dropout: int = 0,
        device: Device = A100,
    ) -> Call:
        gpu = device.multiprocessors, device.shared_bytes
        words = (terms, dropout, dtype, head_dim, *shape, *gpu)
        text = run(self.program, *map(str, words), stdin=self.rows)
        launches: dict[str, dict[str, Launch]] = {"forward": {}, "backward": {}}
        tiles: dict[tuple[str, int], Tiles] = {}
        for kind, *values in map(str.split, text.splitlines()):
            if kind == "launch":
                launches[values[0]][values[1]] = Launch(*map(int, values[2:]))
            elif kind == "tiles":
                tiles[values[0], int(values[1])] = Tiles(*map(int, values[2:]))
            else:
                statistics, far, near = (4 * int(value) for value in values)
        batch, heads, length = shape
        passes = launches["forward"], launches["backward"]
        return Call(device, batch, heads, length, *passes, tiles, statistics, far, near, head_dim)

    def launches(self) -> dict[str, Launch]:
        """Of every kernel there is, by symbol; its blocks are of one call among many."""
        found: dict[str, Launch] = {}
        for dtype in ("bfloat16", "float16"):
            for head_dim in HEAD_DIMS:
                # Dropout takes 16 rows a warp; without, a call this long takes 32 where they fit.
                for terms, dropout in ((0, 0), (0, 1), (2, 0), (2, 1)):
                    call = self((2, 12, 2048), head_dim, dtype, terms, dropout, H100)
                    found |= call.forward | call.backward
        return found
