"""The hub's layout, through the library `datasets`: what it has saved, or loads by name.

Labels that a data set names come as these names, and its -1, "unknown", as None.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .sources import Rows

NAMED = "datasets:"  # begins what `datasets.load_dataset` loads by name
# Files that only this layout has; "validation" is the hub's word for the dev split.
_SIGNS = (
    "dataset_dict.json",
    "*.parquet",
    "data/*.parquet",
    "validation*.jsonl",
    "validation*.json",
)
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def is_hub(data_dir: str | Path) -> bool:
    """Whether data_dir is "datasets:NAME" or a directory in the hub's layout."""
    if str(data_dir).startswith(NAMED):
        return True
    return any(any(Path(data_dir).glob(pattern)) for pattern in _SIGNS)


def rows(data_dir: str | Path, split: str, config: str | None = None) -> Rows:
    """The rows of a split.

    Args:
        data_dir: "datasets:NAME"; or a directory that `DatasetDict.save_to_disk` wrote; or one of
            .parquet or .jsonl files (also in its folder data) whose names begin with the split's.
        split: the hub's name of it, such as "validation_matched". config: of a named data set.

    Raises:
        ImportError: `datasets` is not installed. FileNotFoundError: no such split.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{data_dir} needs datasets: pip install fastdeberta[data]") from None
    where = f"{data_dir}, split {split}"
    if str(data_dir).startswith(NAMED):
        name = str(data_dir).removeprefix(NAMED)
        data = datasets.load_dataset(name, config, split=split)
    else:
        data = _local(datasets, Path(data_dir), split)
    named = {key: _namer(feature) for key, feature in data.features.items()}
    for number, row in enumerate(data):
        yield f"{where}, row {number}", {key: named[key](cell) for key, cell in row.items()}


def _local(datasets: Any, data_dir: Path, split: str) -> Any:
    if (data_dir / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(str(data_dir))
        if split not in data:
            raise FileNotFoundError(f"no split {split!r} in {data_dir}; it has {', '.join(data)}")
        return data[split]
    for suffix, kind in _FORMATS.items():
        patterns = [f"{split}{end}{suffix}" for end in ("", "-*")]
        patterns += [f"data/{pattern}" for pattern in patterns]
        files = sorted(str(path) for pattern in patterns for path in data_dir.glob(pattern))
        if files:
            return datasets.load_dataset(kind, data_files=files, split="train")
    raise FileNotFoundError(
        f"no split {split!r} in {data_dir}; looked for {split}.parquet, {split}-*.parquet, "
        f"{split}.jsonl, also in data, and what save_to_disk writes"
    )


def _namer(feature: Any) -> Callable[[Any], Any]:
    """What turns a column's class numbers into names; other columns stay as they are."""
    inner = getattr(feature, "feature", None)
    if inner is not None and hasattr(inner, "names"):
        return lambda cells: None if cells is None else [inner.names[cell] for cell in cells]
    if hasattr(feature, "names"):
        return lambda cell: None if cell is None or cell < 0 else feature.names[cell]
    return lambda cell: cell
