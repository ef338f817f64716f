"""Compiles the two kernel libraries where it can; pyproject.toml holds everything else.

`fastdeberta._C` (CPU) and `fastdeberta._C_cuda` use LibTorch's stable ABI alone, so that one build
serves every supported torch, and are two, so that a torch without CUDA still loads the first.
Where a library cannot be built, the package installs without it and stderr says why.

Environment: FASTDEBERTA_SKIP_EXT_BUILD=1 builds no library, FASTDEBERTA_SKIP_CUDA_BUILD=1 not the
CUDA one; FASTDEBERTA_FORCE_EXT_BUILD=1 and FASTDEBERTA_FORCE_CUDA_BUILD=1 (or FORCE_CUDA=1) fail
instead of leaving one out; FASTDEBERTA_SANITIZE=1 lets the CPU library check its own memory and
arithmetic (`make test-sanitized`). torch's own CUDA_HOME, TORCH_CUDA_ARCH_LIST (else sm_80, sm_90
and PTX for newer GPUs) and MAX_JOBS (files compiled at a time) hold as well.
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
# Two architectures of a file at a time: there are few files, and each takes less than 500 MB.
NVCC_FLAGS = ["-O3", "-std=c++17", "--threads=2", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA"]
NVCC_FLAGS += DEFINES


def leave_out(library, reason, remedy, demanded):
    message = f"{library}: {reason}. To get it, {remedy}."
    if demanded:
        raise RuntimeError(f"cannot build {message}")
    print(f"fastdeberta: building WITHOUT {message}", file=sys.stderr)


def output_of(*command):
    """What a program prints; nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout + done.stderr


def find_cuda_home():
    """Asks nvcc for CUDA_HOME, which torch reads on import: its own guess fails where nvcc is a
    wrapper script."""
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or not shutil.which("nvcc"):
        return
    steps = output_of("nvcc", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)
    if top := re.search(r"^#\$ TOP=(.+)$", steps, re.M):
        home = os.path.realpath(top[1].strip())
        if shutil.which(os.path.join(home, "bin", "nvcc")):  # else torch's guess is no worse
            os.environ["CUDA_HOME"] = home


def architectures():
    """What nvcc compiles for. torch's own default is the GPUs it sees, and an error if there is
    none; the kernels' instructions came with 8.0, and lists set for all of a machine go lower."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    older = r"[1-7]\.|Kepler|Maxwell|Pascal|Volta|Turing"
    return [arch for arch in (asked or "8.0;9.0+PTX").split(";") if not re.match(older, arch)]


def cuda_obstacle(torch_cuda, cuda_home):
    """What stands in the way of the CUDA library and what would help; None where nothing does."""
    if not CUDA_SOURCES:
        return "this source tree has no CUDA sources", "take a complete one"
    if torch_cuda is None:
        return "the installed torch is not a CUDA build", "install one that is and build again"
    nvcc = cuda_home and shutil.which(os.path.join(cuda_home, "bin", "nvcc"))
    toolkit = f"a CUDA {torch_cuda.split('.')[0]} toolkit (torch's is {torch_cuda})"
    if not nvcc:
        where = f" in {cuda_home}/bin" if cuda_home else ""
        return f"there is no nvcc{where}", f"install {toolkit}, or set CUDA_HOME to it"
    release = re.search(r"release (\d+)\.\d+", output_of(nvcc, "--version"))
    if release is None:
        return f"{nvcc} --version names no release", f"set CUDA_HOME to {toolkit}"
    # Within a major release any nvcc does, as torch's own check has it.
    if release[1] != torch_cuda.split(".")[0]:
        found = release[0].removeprefix("release ")
        reason = f"nvcc is of CUDA {found}, the installed torch of CUDA {torch_cuda}"
        return reason, f"set CUDA_HOME to {toolkit}"
    if not architectures():
        asked = os.environ["TORCH_CUDA_ARCH_LIST"]
        return f"TORCH_CUDA_ARCH_LIST={asked} has no GPU from 8.0 on", "add one, or unset it"
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
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures())
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

        def build_extensions(self):
            try:
                super().build_extensions()
            except RuntimeError as error:  # torch finds the C++ compiler unfit for nvcc
                cuda = [ext for ext in self.extensions if ext.name == "fastdeberta._C_cuda"]
                if FORCE or not cuda:
                    raise
                remedy = "set CC and CXX to such a compiler"
                leave_out(cuda[0].name, str(error).rstrip("."), remedy, FORCE)
                self.extensions.remove(cuda[0])
                super().build_extensions()

        def run(self):
            # What an earlier build made, with other options, would go into the wheel.
            for path in glob(os.path.join(self.build_lib, "fastdeberta", "_C*")):
                os.remove(path)
            super().run()
            self.extensions[:] = [ext for ext in self.extensions if ext not in failed]
            if not self.extensions:  # the wheel had been tagged for this platform
                self.get_finalized_command("bdist_wheel").root_is_pure = True

    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": extensions, "cmdclass": {"build_ext": build_ext}, "options": options}


# The hooks that only read metadata do without torch, whose import takes seconds.
builds = not {"egg_info", "dist_info", "sdist"} & set(sys.argv)
setup(**(libraries() if builds and not is_set("FASTDEBERTA_SKIP_EXT_BUILD") else {}))
