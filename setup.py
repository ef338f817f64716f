"""Compiles the two kernel libraries where it can; pyproject.toml holds everything else.

`fastdeberta._C` (CPU) and `fastdeberta._C_cuda` use LibTorch's stable ABI alone, so that one build
serves every supported torch, and are two, so that a torch without CUDA still loads the first.
Where a library cannot be built, the package installs without it and stderr says why.

Environment: FASTDEBERTA_SKIP_EXT_BUILD=1 builds no library, FASTDEBERTA_SKIP_CUDA_BUILD=1 not the
CUDA one; FASTDEBERTA_FORCE_EXT_BUILD=1 and FASTDEBERTA_FORCE_CUDA_BUILD=1 (or FORCE_CUDA=1) fail
instead of leaving one out; FASTDEBERTA_SANITIZE=1 lets the CPU library check its own memory and
arithmetic (`make test-sanitized`). torch's own CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS hold
as well.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob

from setuptools import setup


def is_set(name):
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


FORCE_CUDA = is_set("FASTDEBERTA_FORCE_CUDA_BUILD") or is_set("FORCE_CUDA")
FORCE = is_set("FASTDEBERTA_FORCE_EXT_BUILD") or FORCE_CUDA
CUDA_SOURCES = sorted(glob("csrc/bindings_cuda.cu") + glob("csrc/cuda/*.cu"))
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]  # torch 2.10's ABI
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", *DEFINES]
if sys.platform == "linux":
    CXX_FLAGS.append("-fopenmp")  # never linked: threads come from torch's parallel_for
LINK_FLAGS = []
if is_set("FASTDEBERTA_SANITIZE"):
    LINK_FLAGS = ["-fsanitize=address,undefined"]
    CXX_FLAGS += ["-O1", "-g1", "-fno-sanitize-recover=all", *LINK_FLAGS]
NVCC_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", *DEFINES]


def leave_out(library, reason, remedy, demanded):
    message = f"{library}: {reason}. To get it, {remedy}."
    if demanded:
        raise RuntimeError(f"cannot build {message}")
    print(f"fastdeberta: building WITHOUT {message}", file=sys.stderr)


def find_cuda_home():
    """Asks nvcc for CUDA_HOME, which torch reads on import: its own guess fails where nvcc is a
    wrapper script."""
    if "CUDA_HOME" not in os.environ and "CUDA_PATH" not in os.environ and shutil.which("nvcc"):
        command = ["nvcc", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
        steps = subprocess.run(command, capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", steps, re.M):
            os.environ["CUDA_HOME"] = os.path.realpath(top[1].strip())


def cuda_obstacle(torch_cuda, cuda_home):
    """What stands in the way of the CUDA library and what would help; None where nothing does."""
    if not CUDA_SOURCES:
        return "this source tree has no CUDA sources", "take a complete one"
    if torch_cuda is None:
        return "the installed torch is not a CUDA build", "install one that is and build again"
    nvcc = cuda_home and shutil.which(os.path.join(cuda_home, "bin", "nvcc"))
    if not nvcc:
        return "there is no nvcc", f"install CUDA {torch_cuda} or set CUDA_HOME"
    release = re.search(
        r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True)
    )
    if release is None or release[1].split(".")[0] != torch_cuda.split(".")[0]:
        found = release[1] if release else "an unknown release"
        return f"nvcc is of CUDA {found}", f"set CUDA_HOME to a CUDA {torch_cuda} toolkit"
    return None


def libraries():
    """Keywords of setup(): the extensions and the command that builds them."""
    find_cuda_home()
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        remedy = "install torch, then build with `pip install --no-build-isolation`"
        leave_out("the compiled kernels", f"torch cannot be imported ({error})", remedy, FORCE)
        return {}

    headers = [path for path in glob("csrc/**/*", recursive=True) if path.endswith((".h", ".cuh"))]
    common = {"depends": headers, "py_limited_api": True, "optional": not FORCE}
    common["extra_link_args"] = LINK_FLAGS
    sources = ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    flags = {"cxx": CXX_FLAGS}
    extensions = [CppExtension("fastdeberta._C", sources, extra_compile_args=flags, **common)]
    if FORCE_CUDA or (CUDA_SOURCES and not is_set("FASTDEBERTA_SKIP_CUDA_BUILD")):
        if obstacle := cuda_obstacle(torch.version.cuda, CUDA_HOME):
            leave_out("the CUDA kernels", *obstacle, FORCE_CUDA)
        else:
            # torch would look for a GPU to compile for.
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
            common["extra_compile_args"] = {"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS}
            extensions.append(CUDAExtension("fastdeberta._C_cuda", CUDA_SOURCES, **common))
    failed = []

    class build_ext(BuildExtension):
        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:  # compilers and ninja fail with any of several types
                remedy = "see to the errors above (a C++17 compiler is needed) and build again"
                leave_out(extension.name, f"compiling failed ({error})", remedy, FORCE)
                failed.append(extension)

        def run(self):
            super().run()
            self.extensions[:] = [ext for ext in self.extensions if ext not in failed]
            if not self.extensions:  # the wheel had been tagged for this platform
                self.get_finalized_command("bdist_wheel").root_is_pure = True

    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": extensions, "cmdclass": {"build_ext": build_ext}, "options": options}


# The hooks that only read metadata do without torch, whose import takes seconds.
builds = not {"egg_info", "dist_info", "sdist"} & set(sys.argv)
setup(**(libraries() if builds and not is_set("FASTDEBERTA_SKIP_EXT_BUILD") else {}))
