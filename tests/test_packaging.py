"""What an install holds where libraries can, and cannot, be compiled: no network, no isolation."""

import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from zipfile import ZipFile

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
DATA = ["py.typed", "presets/sample.yaml", "datasets/a.txt.xz", "datasets/b.md", "datasets/c.txt"]


@pytest.fixture
def tree(tmp_path):
    """A copy of what an install reads, with one file of each kind of package data."""
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT / "fastdeberta",
        tree / "fastdeberta",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    for name in ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, tree)
    for name in DATA:
        path = tree / "fastdeberta" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    # A library left by an earlier build is no part of a pure-Python wheel.
    (tree / "fastdeberta" / "_C.abi3.so").touch()
    return tree


def pip(tree, command, **environment):
    """Runs pip on the tree, verbosely; returns its exit status and output."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FASTDEBERTA_") and name not in ("FORCE_CUDA", "PYTHONPATH")
    }
    options = ["-v", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, *options, str(tree)],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def build_wheel(tree, **environment):
    """Builds a wheel; returns its path and pip's output."""
    status, output = pip(tree, ["wheel", "--wheel-dir", str(tree / "wheels")], **environment)
    assert status == 0, output
    [wheel] = (tree / "wheels").iterdir()
    return wheel, output


def no_compiler(tree):
    """An environment whose PATH holds ninja, but no compiler."""
    missing = str(tree / "missing")
    return {"PATH": str(Path(sys.executable).parent), "CC": missing, "CXX": missing}


def files_of(wheel):
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_without_extensions_the_wheel_is_pure_and_holds_the_data(tree):
    wheel, output = build_wheel(tree, FASTDEBERTA_SKIP_EXT_BUILD="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "WITHOUT" not in output  # as asked: nothing to report
    files = files_of(wheel)
    assert {f"fastdeberta/{name}" for name in DATA} <= files
    assert "fastdeberta/backends/__init__.py" in files
    assert not [name for name in files if name.endswith(".so")]
    assert not [name for name in files if name.startswith(("csrc/", "tests/"))]


def test_the_wheel_holds_every_module_and_data_file(tree):
    wheel, _ = build_wheel(tree, FASTDEBERTA_SKIP_EXT_BUILD="1")
    package = ROOT / "fastdeberta"
    kept = [p for p in package.rglob("*") if p.is_file() and p.suffix not in (".so", ".pyc")]
    expected = {str(p.relative_to(ROOT)) for p in kept}
    assert "fastdeberta/py.typed" in expected  # Of the source itself, not of the fixture.
    assert expected <= files_of(wheel)


def test_without_a_compiler_pure_python_is_installed(tree, tmp_path):
    status, output = pip(tree, ["install", "--target", str(tmp_path / "site")], **no_compiler(tree))
    assert status == 0, output
    assert "building WITHOUT fastdeberta._C: compiling failed" in output
    assert "a C++17 compiler is needed" in output
    assert (tmp_path / "site" / "fastdeberta" / "__init__.py").exists()
    assert not list((tmp_path / "site").rglob("*.so"))
    [metadata] = (tmp_path / "site").glob("fastdeberta-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in metadata.read_text()


def test_a_demanded_build_fails_without_a_compiler(tree):
    demand = {"FASTDEBERTA_FORCE_EXT_BUILD": "1"}
    status, output = pip(tree, ["wheel"], **no_compiler(tree), **demand)
    assert status != 0
    assert "cannot build fastdeberta._C: compiling failed" in output


def test_without_torch_the_wheel_is_pure_and_says_how_to_do_better(tree, tmp_path):
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")")
    wheel, output = build_wheel(tree, PYTHONPATH=str(shim))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "WITHOUT the compiled kernels: torch cannot be imported" in output
    assert "install torch, then build with `pip install --no-build-isolation`" in output


@pytest.mark.slow
def test_with_a_compiler_the_wheel_holds_the_library(tree):
    wheel, _ = build_wheel(tree, FASTDEBERTA_FORCE_EXT_BUILD="1", FASTDEBERTA_SKIP_CUDA_BUILD="1")
    assert "-cp310-abi3-" in wheel.name
    assert "fastdeberta/_C.abi3.so" in files_of(wheel)


def test_a_demanded_cuda_library_fails_the_build_with_its_reason(tree):
    if torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build")
    (tree / "csrc" / "bindings_cuda.cu").touch()
    status, output = pip(tree, ["wheel"], FASTDEBERTA_FORCE_CUDA_BUILD="1")
    assert status != 0
    assert "cannot build the CUDA kernels: the installed torch is not a CUDA build" in output


# What setup.py decides, for a torch and a toolkit that need not be here.

KNOBS = ("SKIP_EXT_BUILD", "SKIP_CUDA_BUILD", "FORCE_EXT_BUILD", "FORCE_CUDA_BUILD", "SANITIZE")
VARIABLES = [f"FASTDEBERTA_{knob}" for knob in KNOBS]
VARIABLES += ["FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CC", "CXX"]
BOTH = ["fastdeberta._C", "fastdeberta._C_cuda"]
INFEASIBLE = "the installed torch is not a CUDA build"


def write_script(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def make_toolkit(home, release):
    """A folder like CUDA_HOME, whose nvcc tells of itself and compiles nothing."""
    write_script(
        home / "bin" / "nvcc",
        'case "$1" in',
        f'--version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;',
        """--dryrun) echo '#$ _SPACE_= ' >&2; echo "#$ TOP=$(dirname "$0")/.." >&2 ;;""",
        "*) exit 1 ;;",
        "esac",
    )
    return str(home)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Imports setup.py, in a folder with a CUDA source, under the given variables alone."""
    sources = tmp_path / "sources"
    (sources / "csrc").mkdir(parents=True)
    for name in ("bindings.cpp", "bindings_cuda.cu"):
        (sources / "csrc" / name).touch()
    monkeypatch.chdir(sources)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    for name in VARIABLES:  # set first, so that what setup.py itself sets is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def load(torch_cuda=None, cuda_home=None, **environment):
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", cuda_home)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        spec = spec_from_file_location("setup_under_test", ROOT / "setup.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def names(keywords):
    return [extension.name for extension in keywords["ext_modules"]]


@pytest.mark.parametrize(
    "torch_cuda, release", [("13.0", "13.0"), ("13.0", "13.2"), ("13.1", "13.0")]
)
def test_nvcc_of_the_major_release_of_torch_builds_both_libraries(
    load, tmp_path, capfd, torch_cuda, release
):
    module = load(torch_cuda, make_toolkit(tmp_path / "cuda", release))
    keywords = module.libraries()
    assert names(keywords) == BOTH
    assert "WITHOUT" not in capfd.readouterr().err
    assert "cudart" in keywords["ext_modules"][1].libraries
    assert "cudart" not in keywords["ext_modules"][0].libraries


@pytest.mark.parametrize("torch_cuda, release", [("13.0", "12.9"), ("12.8", "13.0")])
def test_nvcc_of_another_major_release_is_refused(load, tmp_path, capfd, torch_cuda, release):
    home = make_toolkit(tmp_path / "cuda", release)
    assert names(load(torch_cuda, home).libraries()) == BOTH[:1]
    assert (
        f"WITHOUT the CUDA kernels: nvcc is of CUDA {release}, the installed torch of CUDA "
        f"{torch_cuda}. To get it, set CUDA_HOME to a CUDA {torch_cuda.split('.')[0]} toolkit"
    ) in capfd.readouterr().err


@pytest.mark.parametrize("with_nvcc", [False, True])
def test_a_cpu_torch_gets_the_cpu_library_alone(load, tmp_path, monkeypatch, capfd, with_nvcc):
    home = make_toolkit(tmp_path / "cuda", "13.0")
    monkeypatch.setenv("PATH", f"{home}/bin" if with_nvcc else str(tmp_path))
    assert names(load().libraries()) == BOTH[:1]
    assert f"WITHOUT the CUDA kernels: {INFEASIBLE}" in capfd.readouterr().err


def test_no_nvcc(load, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    reason, remedy = load().cuda_obstacle("13.0", None)
    assert reason == "there is no nvcc" and "install a CUDA 13 toolkit" in remedy
    reason, remedy = load().cuda_obstacle("13.0", str(tmp_path))
    assert reason == f"there is no nvcc in {tmp_path}/bin" and "CUDA_HOME" in remedy


@pytest.mark.parametrize("content", ["#!/bin/sh\nexit 1", "#!/bin/sh\necho release", "\0"])
def test_an_nvcc_that_does_not_run_is_no_nvcc(load, tmp_path, monkeypatch, content):
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    write_script(nvcc)
    nvcc.write_text(content)
    monkeypatch.setenv("PATH", str(nvcc.parent))
    module = load()
    module.find_cuda_home()
    assert "CUDA_HOME" not in os.environ
    reason, _ = module.cuda_obstacle("13.0", str(tmp_path / "cuda"))
    assert reason == f"{nvcc} --version names no release"


def test_a_source_tree_without_cuda_sources(load, capfd):
    Path("csrc/bindings_cuda.cu").unlink()
    module = load("13.0")
    assert names(module.libraries()) == BOTH[:1]
    assert capfd.readouterr().err == ""  # nothing was left out
    assert module.cuda_obstacle("13.0", None)[0] == "this source tree has no CUDA sources"


def test_cuda_home_is_found_behind_a_wrapper_script(load, tmp_path, monkeypatch):
    home = make_toolkit(tmp_path / "cuda", "13.0")
    write_script(tmp_path / "local" / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    system = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{tmp_path}/local/bin:{system}")
    load().find_cuda_home()
    assert os.environ["CUDA_HOME"] == home
    monkeypatch.setenv("CUDA_HOME", "/chosen")
    load().find_cuda_home()
    assert os.environ["CUDA_HOME"] == "/chosen"


def test_a_top_without_nvcc_is_not_taken_for_cuda_home(load, tmp_path, monkeypatch):
    write_script(tmp_path / "bin" / "nvcc", f'echo "#$ TOP={tmp_path}/elsewhere"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    load().find_cuda_home()
    assert "CUDA_HOME" not in os.environ


@pytest.mark.parametrize(
    "asked, taken",
    [
        (None, "8.0;9.0+PTX"),
        ("", "8.0;9.0+PTX"),
        ("9.0", "9.0"),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "8.0;8.6;9.0;10.0;12.0+PTX"),
        ("Turing;Ampere", "Ampere"),
    ],
)
def test_architectures(load, tmp_path, asked, taken):
    environment = {} if asked is None else {"TORCH_CUDA_ARCH_LIST": asked}
    module = load("13.0", make_toolkit(tmp_path / "cuda", "13.0"), **environment)
    assert names(module.libraries()) == BOTH
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == taken
    flags = cpp_extension._get_cuda_arch_flags(module.NVCC_FLAGS)
    assert flags  # torch takes none where a flag of ours contains "arch"


def test_architectures_that_are_all_too_old(load, tmp_path, capfd):
    home = make_toolkit(tmp_path / "cuda", "13.0")
    module = load("13.0", home, TORCH_CUDA_ARCH_LIST="7.0;7.5+PTX")
    assert names(module.libraries()) == BOTH[:1]
    assert "TORCH_CUDA_ARCH_LIST=7.0;7.5+PTX has no GPU from 8.0 on" in capfd.readouterr().err


def test_skipping_the_cuda_library_is_silent(load, tmp_path, capfd):
    home = make_toolkit(tmp_path / "cuda", "13.0")
    assert names(load("13.0", home, FASTDEBERTA_SKIP_CUDA_BUILD="1").libraries()) == BOTH[:1]
    assert "WITHOUT" not in capfd.readouterr().err


@pytest.mark.parametrize("knob", ["FASTDEBERTA_FORCE_CUDA_BUILD", "FORCE_CUDA"])
def test_a_demand_fails_with_reason_and_remedy(load, tmp_path, monkeypatch, knob):
    monkeypatch.setenv("PATH", str(tmp_path))
    other = make_toolkit(tmp_path / "other", "12.9")
    for torch_cuda, home, reason, remedy in [
        (None, None, INFEASIBLE, "install one that is"),
        ("13.0", None, "there is no nvcc", "install a CUDA 13 toolkit"),
        ("13.0", other, "nvcc is of CUDA 12.9", "set CUDA_HOME to a CUDA 13 toolkit"),
    ]:
        pattern = f"cannot build the CUDA kernels: {reason}.*To get it, {remedy}"
        with pytest.raises(RuntimeError, match=pattern):
            load(torch_cuda, home, **{knob: "1"}).libraries()
    Path("csrc/bindings_cuda.cu").unlink()
    with pytest.raises(RuntimeError, match="this source tree has no CUDA sources"):
        load("13.0", other, **{knob: "1"}).libraries()


@pytest.fixture
def build(load, tmp_path, monkeypatch):
    """Runs the build under a CUDA torch; compiling succeeds but for the named libraries."""

    def build(failing=(), **environment):
        def build_extension(self, extension):
            if extension.name in failing:
                raise RuntimeError("Error compiling objects for extension")
            path = Path(self.get_ext_fullpath(extension.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

        monkeypatch.setattr(cpp_extension.BuildExtension, "build_extension", build_extension)
        module = load("13.0", make_toolkit(tmp_path / "cuda", "13.0"), **environment)
        distribution = setuptools.Distribution({"name": "fastdeberta", **module.libraries()})
        command = distribution.get_command_obj("build_ext")
        command.build_lib = str(tmp_path / "lib")
        command.ensure_finalized()
        command.run()
        built = sorted(path.name for path in (tmp_path / "lib").rglob("*.so"))
        assert [name.split(".")[0] for name in built] == [
            extension.name.removeprefix("fastdeberta.") for extension in command.extensions
        ]
        return [name.split(".")[0] for name in built]

    return build


def test_cuda_kernels_that_do_not_compile_leave_the_cpu_library(build, capfd):
    assert build() == ["_C", "_C_cuda"]  # the latter is not to survive into the next build
    assert build(failing=BOTH[1:]) == ["_C"]
    assert "WITHOUT fastdeberta._C_cuda: compiling failed" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="cannot build fastdeberta._C_cuda: compiling failed"):
        build(failing=BOTH[1:], FASTDEBERTA_FORCE_CUDA_BUILD="1")
    with pytest.raises(RuntimeError, match="^cannot build fastdeberta._C: compiling failed"):
        build(failing=BOTH[:1], FASTDEBERTA_FORCE_CUDA_BUILD="1")


@pytest.mark.skipif(sys.platform != "linux", reason="torch checks the compiler on Linux")
def test_a_compiler_unfit_for_nvcc_leaves_the_cpu_library(build, tmp_path, monkeypatch, capfd):
    write_script(
        tmp_path / "g++",
        'case "$1" in -dump*) echo 99.0.0 ;; *) echo "g++ (GCC) 99.0.0" ;; esac',
    )
    compiler = {"CC": str(tmp_path / "g++"), "CXX": str(tmp_path / "g++")}
    # A fake is known by its version alone.
    monkeypatch.setattr(cpp_extension, "check_compiler_ok_for_platform", lambda _: True)
    assert build(**compiler) == ["_C"]
    message = capfd.readouterr().err
    assert "WITHOUT fastdeberta._C_cuda: The current installed version of " in message
    assert "99.0.0" in message and "To get it, set CC and CXX to such a compiler." in message
    with pytest.raises(RuntimeError, match="99.0.0"):
        build(**compiler, FASTDEBERTA_FORCE_CUDA_BUILD="1")


NVCC = shutil.which("nvcc")
CUDA_SOURCES = sorted([*ROOT.glob("csrc/bindings_cuda.cu"), *ROOT.glob("csrc/cuda/*.cu")])


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_sources_compile_as_an_install_compiles_them(load, tmp_path, monkeypatch, source):
    module = load("13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", ";".join(module.architectures()))
    flags = [*cpp_extension.COMMON_NVCC_FLAGS, "-Xcompiler=-fPIC", *module.NVCC_FLAGS]
    flags += cpp_extension._get_cuda_arch_flags(module.NVCC_FLAGS)
    headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    command = [NVCC, "-c", *flags, *headers, str(source), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout, done.stdout


def test_pytest_by_itself_collects_the_gpu_tests():
    """As the README has it: `python -m pytest` also looks into the current folder, `pytest` not."""
    command = [Path(sys.executable).with_name("pytest"), "--collect-only", "-q", "-m", "gpu"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
