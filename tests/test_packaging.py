"""What an install holds where libraries can, and cannot, be compiled: no network, no isolation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

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
