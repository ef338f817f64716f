"""Files of weights: safetensors and pickles, whole or sharded; arrays of Google's ELECTRA."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile

import torch
from torch import Tensor

from . import layouts

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX = f"{SAFETENSORS}.index.json"

# What is looked for in a directory, in this order; arrays follow.
_NAMES = (SAFETENSORS, INDEX, PICKLE, f"{PICKLE}.index.json")

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def find_weights(directory: Path, name: str | None = None) -> Path:
    """The file of a directory's weights: `name`, or the first of the usual names.

    Returns the directory itself where it holds arrays (see `read_arrays`).

    Raises:
        FileNotFoundError: none there; the message names what else lies there.
    """
    for candidate in _NAMES if name is None else (name,):
        if (directory / candidate).is_file():
            return directory / candidate
    if name is None and _arrays(directory):
        return directory
    others = sorted(
        p.name
        for p in directory.glob("*")
        if p.suffix in (".bin", ".safetensors", ".npz", ".index")
    )
    hint = f"; weights= may name one of {', '.join(others)}" if others else ""
    if any(other.endswith(".index") for other in others):
        hint = "; TensorFlow's files must be converted first, see weights.read_arrays"
    raise FileNotFoundError(f"no weights at {directory / (name or SAFETENSORS)}{hint}")


def read_weights(path: str | Path, name: str | None = None) -> dict[str, Tensor]:
    """Every tensor of a file or of a directory's file (see `find_weights`), on the CPU.

    Raises:
        FileNotFoundError: no weights there. ValueError: a damaged file.
    """
    path = Path(path)
    if path.is_dir():
        path = find_weights(path, name)
    if path.is_dir() or path.suffix == ".npz":
        return read_arrays(path)
    if not path.name.endswith(".index.json"):
        return _read(path)
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a JSON object with a weight_map") from None
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(names)):
        tensors.update(_read(path.parent / shard))
    return tensors


def _read(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise FileNotFoundError(f"no weights at {file}")
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated: {error}") from None


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, UnpicklingError):
        tensors = None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file} is damaged, or holds more than weights")
    return tensors


def read_arrays(path: str | Path) -> dict[str, Tensor]:
    """The variables of a TensorFlow checkpoint of google-research/electra, saved as arrays.

    `path` is one .npz file, or a directory that holds one, or a directory of .npy files. An
    array's name is its variable's; in the path of a .npy file, below the directory and without
    its ending, every "." and ":" stands for a "/", as a folder does
    (electra/embeddings/word_embeddings.npy or electra.embeddings.word_embeddings.npy). A ":0" at
    a name's end is dropped.

    No reader of TensorFlow's own files is maintained outside of TensorFlow. Where that is
    installed, two lines make such a file of a checkpoint:

        reader = tf.train.load_checkpoint("electra_small")  # a directory, or its model.ckpt
        np.savez("electra_small.npz", **{
            name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})

    Raises:
        ValueError: a damaged file, or an array of Python objects.
    """
    import numpy as np

    path = Path(path)
    arrays = {}
    file = path
    try:
        for file in [path] if path.is_file() else _arrays(path):
            loaded = np.load(file, allow_pickle=False)
            if file.suffix == ".npz":
                with loaded:
                    arrays.update({re.sub(r":\d+$", "", name): loaded[name] for name in loaded})
            else:
                relative = file.relative_to(path).with_suffix("").as_posix()
                arrays[re.sub(r"[.:]", "/", re.sub(r":\d+$", "", relative))] = loaded
    except (ValueError, OSError, EOFError, UnpicklingError, BadZipFile) as error:
        raise ValueError(f"{file} is damaged or no file of arrays: {error}") from None
    # torch takes no copy of an array that it can read in place, and warns of what it cannot write.
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _arrays(directory: Path) -> list[Path]:
    archives = sorted(directory.glob("*.npz"))
    if len(archives) > 1:
        names = ", ".join(p.name for p in archives)
        raise ValueError(f"{directory} must hold one .npz file, or none; it holds {names}")
    return archives or sorted(directory.rglob("*.npy"))


def from_tensorflow(tensors: dict[str, Tensor], generator: bool) -> dict[str, Tensor]:
    """Variables of Google's ELECTRA under transformers' names, kernels transposed.

    Args:
        generator: the generator's encoder instead of the discriminator's. It reads the
            discriminator's embeddings unless the checkpoint has some of its own, and is the
            discriminator's encoder where the checkpoint has no other.
    """
    of_generator = any(name.startswith("generator/encoder/") for name in tensors)
    span = any("/qa_hidden/" in name for name in tensors)
    chosen: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own, _, rest = name.partition("/")
        if of_generator and own in ("electra", "generator"):
            shared = rest.startswith("embeddings/") and f"generator/{rest}" not in tensors
            if (own == "generator") != generator and not (generator and shared):
                continue
            name = f"electra/{rest}"
        kernel = name.endswith("/kernel") and tensor.dim() == 2
        chosen[layouts.from_tensorflow(name, span)] = tensor.t().contiguous() if kernel else tensor
    return chosen


def write_safetensors(
    tensors: dict[str, Tensor], directory: Path, max_shard_size: int | str | None = None
) -> None:
    """Writes model.safetensors; or, where that would be larger than `max_shard_size` (bytes, or
    as "500MB"; None: no limit), numbered files of at most that size and an index of them.

    A tensor that is larger on its own gets a file of its own.
    """
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    limit, used = _bytes(max_shard_size), 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and used + tensor.nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    if len(shards) == 1:
        save_file(tensors, directory / SAFETENSORS, metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def written(names: Iterable[str]) -> list[str]:
    """Those of a directory's file names that `write_safetensors` uses."""
    pattern = rf"{SAFETENSORS}(\.index\.json)?|model-\d+-of-\d+\.safetensors"
    return sorted(name for name in names if re.fullmatch(pattern, name))


def _bytes(size: int | str | None) -> int | None:
    if size is None or (isinstance(size, int) and size > 0):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMG]?B)", str(size))
    if match is None or isinstance(size, int):
        raise ValueError(
            f"max_shard_size must be bytes above 0 or such as '500MB' or '2GB', got {size!r}"
        )
    return int(match[1]) * _UNITS[match[2]]
