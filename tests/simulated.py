"""The CUDA kernels as a backend of the CPU, run by csrc/simt: `simt`, for tests alone.

`python tests/simulated.py` builds them, which the first call does otherwise.
"""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from simt.toolchain import BUILD, COMPILER, ROOT, compile_once, cuda_home
from torch import Tensor

from fastdeberta.backends import AttentionParams, compiled, cuda

_LIBRARY = "fastdeberta_C_simt"


def build() -> Path:
    """Compiles csrc/cuda for the CPU, into a library of operators."""
    home, package = cuda_home(), Path(torch.__file__).parent
    flags = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    flags += [f"-isystem{home}/include", f"-isystem{package}/include", "-Wno-unknown-pragmas"]
    sources = [ROOT / "csrc/simt/simt.cpp", ROOT / "csrc/bindings_cuda.cu"]
    sources += sorted(ROOT.glob("csrc/cuda/*.cu"))

    def compile_source(source: Path) -> Path:
        command = [COMPILER, *flags, "-x", "c++", "-c", str(source)]
        return compile_once(BUILD / f"{source.stem}-library.o", command, [source])

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, sources))
    link = [COMPILER, "-shared", *map(str, objects), f"-L{package}/lib"]
    return compile_once(BUILD / "_C_simt.so", [*link, "-ltorch", "-ltorch_cpu", "-lc10"], objects)


@cache
def unavailable() -> str | None:
    if cuda_home() is None:
        return "there are no CUDA headers: set CUDA_HOME"
    try:
        torch.ops.load_library(str(build()))
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        return f"the CUDA kernels cannot be built for the CPU: {error}"
    return None


def unsupported(query: Tensor, params: AttentionParams) -> str | None:
    if query.device.type != "cpu":
        return f"it takes tensors on the CPU, not on {query.device}"
    return cuda.refusal(query, params)


def forward(query, key, value, pos_key, pos_query, params):
    inputs = cuda.aligned(query, key, value, pos_key, pos_query)
    return compiled.forward(_LIBRARY, inputs, params)


def backward(dout, query, key, value, pos_key, pos_query, out, lse, params):
    inputs = cuda.aligned(dout, query, key, value, pos_key, pos_query)
    return compiled.backward(_LIBRARY, inputs, out, lse, params)


if __name__ == "__main__":
    print(build())
