"""Imports point one way: cli -> ... -> models -> attention -> op -> backends."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastdeberta
from fastdeberta.backends import MODULES

PACKAGE = "fastdeberta"
SOURCE = Path(fastdeberta.__file__).parent

LEAVES = {
    "cache",
    "composed",
    "datasets",
    "dropout",
    "figures",
    "files",
    "libraries",
    "packing",
    "relative_position",
    "timing",
}

# Which parts of the package each part may import. A part is a module or folder of the package.
MAY_IMPORT = dict.fromkeys(LEAVES, set[str]()) | {
    "tokenizer": {"files"},
    "backends": {"dropout", "libraries", "relative_position"},
    "op": {"backends", "relative_position"},
    "attention": {"cache", "composed", "op", "relative_position"},
    "inference": {"op", "packing", "relative_position"},
    "integrations": {"attention", "backends", "inference", "op", "packing", "relative_position"},
    "models": {"attention", "cache", "files", "inference", "op", "packing", "relative_position"},
    "training": {"attention", "files", "models"},
    "pretraining": {"datasets", "files", "models", "packing", "tokenizer", "training"},
    "finetuning": {"attention", "figures", "files", "models", "packing", "tokenizer", "training"},
}
# What a command does on its own may use every part above; the command line calls them all.
MAY_IMPORT |= {
    "bench": {"backends", "files", "op", "relative_position", "timing"},
    "info": {"backends", "libraries", "op", "relative_position"},
    "export": {"attention", "files", "models"},
}
MAY_IMPORT |= {"demo": set(MAY_IMPORT), "study": set(MAY_IMPORT)}
MAY_IMPORT |= {"cli": set(MAY_IMPORT), "__main__": {"cli"}}

# What lies below the modules: no nn.Module, and no third party but these.
CORE = {"backends", "dropout", "libraries", "op", "relative_position"}
THIRD_PARTY = dict.fromkeys(CORE | {"attention"}, {"torch"}) | {"backends": {"torch", "triton"}}

# Names that say nothing of what they hold.
FORBIDDEN_NAMES = {"common", "helpers", "misc", "utils"}


def violations(source: Path) -> list[str]:
    """What the package at `source` imports against the rules above, one line each."""
    modules = {module_name(path, source): path for path in source.rglob("*.py")}
    return [
        f"{path.relative_to(source)}: {complaint}"
        for module, path in sorted(modules.items())
        for complaint in complaints(module, path, set(modules))
    ]


def module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join((PACKAGE, *parts)).removesuffix(".__init__")


def complaints(module: str, path: Path, modules: set[str]) -> Iterator[str]:
    part = part_of(module)
    if path.stem in FORBIDDEN_NAMES:
        yield "name it after what it holds"
    if part is None:  # The package itself imports what it offers.
        return
    if part not in MAY_IMPORT:
        yield f"{part} has no place in MAY_IMPORT"
        return
    tree = ast.parse(path.read_text())
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for target in imports(tree, package, modules):
        root = target.split(".")[0]
        if root == PACKAGE:
            yield from complaint_inside(module, target)
        elif part in THIRD_PARTY and root not in THIRD_PARTY[part] | sys.stdlib_module_names:
            yield f"{part} must not import {root}"
        elif part in CORE and (target == "torch.nn" or target.startswith("torch.nn.")):
            yield f"{part} must not import torch.nn"
    for node in ast.walk(tree) if part in CORE else ():
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.nn":
            yield f"{part} must not use torch.nn"


def complaint_inside(module: str, target: str) -> Iterator[str]:
    part, other = part_of(module), part_of(target)
    if other is None:
        if target != f"{PACKAGE}.__version__":
            yield f"{part} must not import the package itself"
    elif other != part:
        if other not in MAY_IMPORT[part]:
            yield f"{part} must not import {other}"
    elif part == "backends":
        mine, theirs = backend_of(module), backend_of(target)
        if theirs is not None and mine != theirs:
            yield f"backend {mine or 'registry'} must not import backend {theirs}"


def part_of(module: str) -> str | None:
    """fastdeberta.models.config -> models; None: the package itself, or a name that it holds."""
    names = module.split(".")
    return names[1] if len(names) > 1 and names[1] != "__version__" else None


def backend_of(module: str) -> str | None:
    """fastdeberta.backends.triton.tiles -> triton; None: what backends share."""
    names = module.split(".")
    return names[2] if len(names) > 2 and names[2] in MODULES else None


def imports(tree: ast.Module, package: str, modules: set[str]) -> Iterator[str]:
    """Every imported module, wherever the statement stands; of the package, also its names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{above}.{base}".removesuffix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}"
                known = name in modules or name in ("torch.nn", f"{PACKAGE}.__version__")
                yield name if known else base


def test_imports_point_one_way():
    assert violations(SOURCE) == []


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_the_rules_have_no_cycle(part):
    reached, fresh = set(), set(MAY_IMPORT[part])
    while fresh:
        reached |= fresh
        fresh = set().union(*(MAY_IMPORT[p] for p in fresh)) - reached
    assert part not in reached


TREE = {
    "__init__.py": "from .op import attention\nfrom .models import Model",
    "backends/__init__.py": "from ..relative_position import Rule",
    "backends/reference.py": "import torch\nfrom ..dropout import keep\nfrom . import Params",
    "backends/triton/__init__.py": "import triton\nfrom .bands import band",
    "backends/triton/bands.py": "from .. import Params",
    "dropout.py": "import torch",
    "models/__init__.py": "from ..attention import A\nfrom .. import __version__",
    "attention.py": "from torch import nn\nfrom .op import attention",
    "op.py": "from . import backends",
    "relative_position.py": "import math, torch",
}


@pytest.mark.parametrize(
    ("path", "code", "complaint"),
    [
        ("attention.py", "from .models import Model", "attention must not import models"),
        ("attention.py", "from . import models", "attention must not import models"),
        ("attention.py", "import fastdeberta.models", "attention must not import models"),
        ("attention.py", "def f():\n    from .models import M", "attention must not import models"),
        ("attention.py", "from .backends import Params", "attention must not import backends"),
        ("attention.py", "import transformers", "attention must not import transformers"),
        ("op.py", "from fastdeberta import Model", "op must not import the package itself"),
        ("op.py", "from torch import nn", "op must not import torch.nn"),
        ("models/__init__.py", "from .. import backends", "models must not import backends"),
        ("models/x.py", "from ..backends.reference import f", "models must not import backends"),
        ("dropout.py", "from .relative_position import R", "dropout must not import relative_pos"),
        ("relative_position.py", "import numpy", "relative_position must not import numpy"),
        ("backends/__init__.py", "from ..op import f", "backends must not import op"),
        ("backends/__init__.py", "from . import reference", "registry must not import backend ref"),
        ("backends/reference.py", "from .triton import f", "reference must not import backend tri"),
        ("backends/triton/bands.py", "from ..reference import f", "triton must not import backen"),
        (
            "backends/reference.py",
            "import torch.nn.functional",
            "backends must not import torch.nn",
        ),
        (
            "backends/reference.py",
            "import torch\ntorch.nn.Linear",
            "backends must not use torch.nn",
        ),
        ("novelty.py", "", "novelty has no place in MAY_IMPORT"),
        ("models/utils.py", "", "name it after what it holds"),
    ],
)
def test_a_planted_violation_is_found(path, code, complaint, tmp_path):
    def plant(files):
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    plant(TREE)
    assert violations(tmp_path) == []
    plant({path: code})
    (found,) = violations(tmp_path)
    assert found.startswith(f"{path}: ") and complaint in found


def test_importing_the_package_imports_no_extra():
    extras = (
        "datasets huggingface_hub matplotlib pyarrow rich safetensors sklearn tensorboard "
        "tokenizers transformers "
        "triton typer yaml"
    )
    code = f"import sys, fastdeberta; print(*(set({extras.split()!r}) & set(sys.modules)))"
    # torch itself imports triton where it is installed.
    baseline = "import sys, torch; print(*sys.modules)"
    loaded, by_torch = (
        set(
            subprocess.run(
                [sys.executable, "-c", script],
                capture_output=True,
                text=True,
                check=True,
                cwd=SOURCE.parent,
            ).stdout.split()
        )
        for script in (code, baseline)
    )
    assert loaded - by_torch == set()
