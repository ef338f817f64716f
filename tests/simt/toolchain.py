"""Builds programs that run CUDA kernels on the CPU (csrc/simt), for each tool that checks them."""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.toolkit import find_toolkit

ROOT = Path(__file__).parent.parent.parent
CSRC = ROOT / "csrc"
SOURCES = ROOT / "tests/simt"
BUILD = ROOT / "build/simt"
COMPILER = os.environ.get("CXX", "g++")

# Kernels look at shared memory through pointers of any type, as GPU compilers allow. Optimised, but
# little: the reports of the tools then name the lines.
COMMON = [
    "-std=c++17",
    "-O1",
    "-g",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]
# Checks by calls, and none of null pointers (which crash), of pointers that wrap or of objects'
# sizes: kernels compile some four times as fast.
MEMORY = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,pointer-overflow,vptr",
    "-fno-sanitize-recover=all",
    "--param=asan-instrumentation-with-call-threshold=0",
]

# Of each tool: flags for kernels and linking, flags for the runtime, library that it needs. GCC's
# TSan misses what is read to pass a struct, such as __half, unless the function is inlined: -O2.
TOOLS: dict[str, tuple[list[str], list[str], str | None]] = {
    "plain": ([], [], None),
    "asan": (MEMORY, MEMORY, "libasan.so"),
    "tsan": (["-fsanitize=thread", "-O2"], ["-DSIMT_TSAN"], "libtsan.so"),
    "valgrind": ([], ["-DSIMT_VALGRIND"], None),
}


@functools.cache
def cuda_home() -> Path | None:
    """The toolkit that has CUDA's headers; no compiler is needed."""
    return find_toolkit("include/cuda_fp16.h", "/usr/local/cuda")


def require(tool: str) -> None:
    """Skips the test, and says why, where something is missing that `tool` needs."""
    if cuda_home() is None:
        pytest.skip("there are no CUDA headers: set CUDA_HOME")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}")
    if tool == "valgrind":
        if shutil.which("valgrind") is None:
            pytest.skip("there is no valgrind")
        header = ["-fsyntax-only", "-x", "c++", "-include", "valgrind/memcheck.h", os.devnull]
        if subprocess.run([COMPILER, *header], capture_output=True).returncode:
            pytest.skip("there are no headers of valgrind")
    library = TOOLS[tool][2]
    if library:
        where = [COMPILER, f"-print-file-name={library}"]
        if not os.path.isabs(subprocess.check_output(where, text=True).strip()):
            pytest.skip(f"{COMPILER} has no {library}")


def compile_once(output: Path, command: list[str], sources: list[Path]) -> Path:
    """Runs `command` with -o `output` unless that is there, newer than all sources and headers."""
    headers = [p for p in CSRC.glob("**/*") if p.suffix in (".h", ".cuh")]
    digest = hashlib.sha256(" ".join(command).encode()).hexdigest()[:12]
    output = output.with_name(f"{output.stem}-{digest}{output.suffix}")
    newest = max(path.stat().st_mtime for path in [*sources, *headers])
    output.parent.mkdir(parents=True, exist_ok=True)
    # Tests in other processes may want the same: one makes it, and the others wait.
    with open(output.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists() or output.stat().st_mtime < newest:
            unfinished = output.with_name(f"{output.stem}-unfinished{output.suffix}")
            done = subprocess.run(
                [*command, "-o", str(unfinished)], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            unfinished.rename(output)
    return output


def build(
    name: str, tool: str = "plain", *kernels: tuple[Path, list[str]], csrc: Path = CSRC
) -> Path:
    """The program of tests/simt/`name`, to be checked by `tool`.

    kernels: further sources, and flags for each. csrc: where <cuda/...> and <philox.h> are found.
    """
    require(tool)
    flags, runtime_flags, _ = TOOLS[tool]
    compiler = [COMPILER, *COMMON, "-isystem", str(cuda_home() / "include")]  # type: ignore[operator]
    definitions = [flag for flag in runtime_flags if flag.startswith("-D")]
    # Kernels without flags are the same to every tool.
    kind = tool if flags else "plain"
    parts = [
        (CSRC / "simt/simt.cpp", tool, runtime_flags),
        (SOURCES / name, tool, [*flags, *definitions, f"-I{csrc}"]),
        *((source, kind, [*flags, *more, f"-I{csrc}"]) for source, more in kernels),
    ]

    def compile_part(part: tuple[Path, str, list[str]]) -> Path:
        source, kind, part_flags = part
        # Of another csrc, compile_once does not know the headers.
        sources = [source, *csrc.glob("cuda/*")]
        command = [*compiler, *part_flags, "-x", "c++", "-c", str(source)]
        return compile_once(BUILD / f"{source.stem}-{kind}.o", command, sources)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_part, parts))
    link = [COMPILER, *flags, *map(str, objects), "-pthread"]
    return compile_once(BUILD / f"{Path(name).stem}-{tool}.exe", link, objects)


def run(tool: str, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program as `tool` has it: 9 is valgrind's exit status after an error, 66 TSan's."""
    words = list(map(str, command))
    if tool == "valgrind":
        words = ["valgrind", "-q", "--error-exitcode=9", *words]
    random_bits = Path("/proc/sys/vm/mmap_rnd_bits")
    # Mappings at more random addresses than these are more than some TSans know of.
    if tool == "tsan" and random_bits.exists() and int(random_bits.read_text()) > 28:
        words = ["setarch", "-R", *words]
    quiet = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}
    return subprocess.run(
        words, env=os.environ | quiet | environment, capture_output=True, text=True, timeout=120
    )
