"""A copy of csrc with many bugs, each of which the variable MUTANT turns on when a program runs.

So they take one compilation for all.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from simt.toolchain import BUILD, CSRC

COPY = BUILD / "mutants"

# Where each thread waits, and what tells it for what; each is left out once.
_STATEMENT = re.compile(
    r"(?:__syncthreads|__syncwarp|ptx::cp_async_wait<\d>|ptx::cp_async_commit)\(\);"
)

# File, place of an expression, and what takes the place of the expression between « ».
_EXPRESSIONS = [
    ("tile.cuh", "(«chunk ^ swizzle») * 8", "(chunk ^ swizzle) | 1"),
    ("tile.cuh", "inside = «row < valid»;", "row <= valid"),
    ("tile.cuh", "inside = «row < valid»;", "row < valid - 1"),
    ("tile.cuh", "at[n] = «row(n) < valid» ?", "row(n) <= valid"),
    ("tile.cuh", "at[n] = «row(n) < valid» ?", "row(n) < valid - 1"),
    ("tile.cuh", "if («r >= valid») continue;", "r > valid"),
    ("tile.cuh", "if («r >= valid») continue;", "r >= valid - 1"),
    ("bands.cuh", "return «n < Shape::kRing» ?", "n <= Shape::kRing"),
    ("bands.cuh", ": «n - Shape::kRing»;", "n - Shape::kRing + 16"),
    ("bands.cuh", "? «base - kBlockN + Shape::kRing» :", "base"),
    ("bands.cuh", ": «base - kBlockN»;", "base"),
    ("bands.cuh", "rows(«shift + row») * table.stride", "shift + row + 1"),
    ("bands.cuh", "rings.place(16 * («kTiles * warp + n»))", "kTiles * warp + n + 1"),
    ("bands.cuh", "rings.place(16 * «block»)", "(block ^ 1)"),
    ("bands.cuh", "n = block - («kStrips - 1 - s»)", "s"),
    ("bands.cuh", "strip + («kBlockN» + row - column) * kPitch", "kBlockN + 1"),
    ("bands.cuh", "kPitch + «16» + 16 * tile + row", "17"),
    ("bands.cuh", "lane / 2 + last * «kBlockN»;", "(kBlockN - 16)"),
    ("bands.cuh", "column + («column <= 15 - row % 16» ? 0", "column < 15 - row % 16"),
    ("call.cuh", "x0 - rows.high() + «1»;", "2"),
    ("call.cuh", "block - «1» - rows.low()", "2"),
    ("call.cuh", "last = «n + 1»;", "n"),
    ("call.cuh", "masked = min(masked, «n»);", "n + 1"),
    ("call.cuh", "attended(p, s, token + «32»)", "31"),
    ("forward.cuh", "counts && y <= «lane_row» + 16 * m", "lane_row - 1"),
    ("forward.cuh", "y0 + kBlockN - «1» > warp_row", "17"),
    ("forward.cuh", "«y0 + kBlockN > seq.plain»)", "y0 + kBlockN > seq.plain + 1"),
    ("forward.cuh", "«x0 + kBlockM > seq.plain»;", "x0 + kBlockM > seq.plain + 1"),
    ("forward.cuh", "min(seq.length, «x0 + kBlockM»)", "x0 + kBlockM - 64"),
    ("forward.cuh", "rule.draw(stream, «lane_row + 16 * m»,", "lane_row + 16 * m + 1"),
    ("side.cuh", "«y0 < warp_row + 15» :", "y0 < warp_row"),
    ("side.cuh", ": «y0 + kBlock - 1 > warp_row»);", "y0 + kBlock - 17 > warp_row"),
    ("side.cuh", "«y0 + kBlock <= seq.plain»)", "y0 + kBlock <= seq.plain + 1"),
    ("side.cuh", "(kKeys ? «seq.plain < seq.tokens» :", "false"),
    ("side.cuh", "rings.place(16 * («threadIdx.x / 32 + k»))", "threadIdx.x / 32 + k + 1"),
    ("side.cuh", "first = «x0 / kBlock»;", "x0 / kBlock + 1"),
    ("side.cuh", "end = min(end, «x0 + kBlock»);", "x0"),
    ("backward.cuh", "__shfl_xor_sync(~0u, kept, «4»)", "8"),
    ("side.cuh", "end_far(row, «(kind == 0) != kKeys»)", "kind == 0"),
    ("side.cuh", "for (int step = 4; step < «32»;", "16"),
    ("table.cuh", "(kOwn ? strip : «3 - strip»)", "strip"),
    ("table.cuh", "«(tile_shift - 1)» * kBlock", "tile_shift"),
    ("table.cuh", "int low = 0, high = «distances»;", "distances - 1"),
    ("table.cuh", "p.first_distance + end - «1»)", "2"),
    ("table.cuh", "max(0, «above - 1»)", "above"),
    ("table.cuh", "min(«above», w.diagonals - 1)", "above - 1"),
    ("table.cuh", "side ? «end < distances» :", "end <= distances"),
    ("table.cuh", ": «begin > 0») continue;", "begin >= 0"),
    ("table.cuh", "out + «kShifts * D»)", "kShifts * D + D"),
    ("table.cuh", "number < «steps * p.sequences»;", "steps * p.sequences - 1"),
    ("attention.cu", "take(«4» * p.heads", "3"),
    ("attention.cu", "* 2 * («2 * kBlock») *", "2 * kBlock - 1"),
    ("attention.cu", "p.first_distance - 63, kBlock) + «1»;", "2"),
    ("attention.cu", "p.last_distance + «62», kBlock)", "-2"),
    ("attention.cu", "longest = «p.max_seqlen - 1»;", "p.max_seqlen - 65"),
]  # fmt: skip


# Results stay right, yet a tool complains.
_ONLY_TOOLS = {
    # Reads one row too many, which then counts for nothing.
    "tile.cuh: row(n) <= valid, not row(n) < valid": "valgrind",
    # ldmatrix or mma come between read and write, which bring lanes together but order no memory.
    "side.cuh: without __syncwarp(); 1": "tsan",
    "side.cuh: without __syncwarp(); 4": "tsan",
}

# Nothing depends on these where they are.
_REDUNDANT = {
    # Of each_x: tiles(), which always follows, begins with a barrier.
    "side.cuh: without __syncwarp(); 2",
    # After the last tile only an empty group is left.
    "side.cuh: without ptx::cp_async_wait<0>(); 2",
    # Of end_far(): what follows begins with a barrier.
    "side.cuh: without __syncthreads(); 7",
}


class Mutant(NamedTuple):
    name: str
    number: int
    # What notices. None: nothing does, as nothing is wrong; "missing": the kernels have changed.
    tool: str | None


def _mutate() -> tuple[list[Mutant], dict[str, str]]:
    """All mutants, and the text of each file that has some."""
    texts = {path.name: path.read_text() for path in sorted(CSRC.glob("cuda/*"))}
    found: list[Mutant] = []

    def add(name: str) -> int:
        tool = None if name in _REDUNDANT else _ONLY_TOOLS.get(name, "plain")
        found.append(Mutant(name, len(found), tool))
        return found[-1].number

    mutated: dict[tuple[str, str], str] = {}  # by file and place, which may have several mutants
    for name, place, replacement in _EXPRESSIONS:
        before, old, after = re.split("[«»]", place)
        number = add(f"{name}: {replacement}, not {old}")
        now = mutated.get((name, place), old)
        if texts.get(name, "").count(before + now + after) != 1:
            found[-1] = found[-1]._replace(tool="missing")
            continue
        changed = f"(mutant == {number} ? ({replacement}) : ({now}))"
        texts[name] = texts[name].replace(before + now + after, before + changed + after)
        mutated[name, place] = changed
    for name, text in texts.items():
        if not name.endswith(".cuh") or name == "ptx.cuh":
            continue
        counts: Counter[str] = Counter()

        def leave_out(match: re.Match, name=name, counts=counts) -> str:
            counts[match[0]] += 1
            number = add(f"{name}: without {match[0]} {counts[match[0]]}")
            return f"if (mutant != {number}) {match[0]}"

        texts[name] = _STATEMENT.sub(leave_out, text)
    variable = '\n#include <cstdlib>\ninline const int mutant = std::atoi(std::getenv("MUTANT"));\n'
    texts["ptx.cuh"] = texts["ptx.cuh"].replace("#pragma once\n", f"#pragma once\n{variable}")
    return found, texts


MUTANTS, _TEXTS = _mutate()


def write() -> Path:
    """Makes the copy, unless it is there. Returns its csrc."""
    texts = {f"cuda/{name}": text for name, text in _TEXTS.items()}
    others = [*CSRC.glob("*.h"), *CSRC.glob("simt/*.h")]
    texts |= {str(path.relative_to(CSRC)): path.read_text() for path in others}
    for name, text in texts.items():
        path = COPY / "csrc" / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Tests in other processes may write the same.
            unfinished = path.with_name(f"{path.name}-{os.getpid()}")
            unfinished.write_text(text)
            unfinished.rename(path)
    return COPY / "csrc"
