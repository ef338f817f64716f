"""Launch configurations: tile sizes, warps and pipeline stages, by GPU family, head dim and dtype.

FASTDEBERTA_TRITON_PROFILE names a JSON file that takes the place of the table for one machine; see
`fastdeberta bench --tune`.
"""

import json
import os
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """warps of a program, and stages of its loop's loads."""

    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """One pass.

    block: side of the tiles that scores are cut into, a power of two of at least 16.
    step: keys or queries that the backward pass takes at a time, a tile or a part of one.
    rows, columns: tile of the products that make bands; rows are a residue's, of 8 * rows tokens.
    The launches are of the kernels of these names.
    """

    block: int
    step: int
    rows: int
    columns: int
    band: Launch
    forward: Launch = Launch(4, 2)
    dq: Launch = Launch(4, 2)
    near_dkv: Launch = Launch(4, 2)
    dkv: Launch = Launch(4, 2)
    content: Launch = Launch(4, 2)
    table: Launch = Launch(4, 2)

    @property
    def launches(self) -> dict[str, Launch]:
        """The launches by kernel."""
        return {field.name: getattr(self, field.name) for field in fields(self)[4:]}

    def smaller(self) -> "Config | None":
        """With less shared memory: one stage, then smaller tiles; None: there is none."""
        if any(how.stages > 1 for how in self.launches.values()):
            return replace(self, **{k: Launch(how[0], 1) for k, how in self.launches.items()})
        if self.block > 16:
            half = {"block": self.block // 2, "rows": max(16, self.rows // 2)}
            return replace(self, **half, columns=max(32, self.columns // 2))
        return None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        return cls(**{k: Launch(*v) if isinstance(v, list) else v for k, v in values.items()})


def key(backward: bool, size: int, dtype: torch.dtype, far: bool) -> str:
    """Name of a configuration in a profile. size: head dim, padded to a power of two."""
    words = ("backward" if backward else "forward", str(size), str(dtype).removeprefix("torch."))
    return "-".join((*words, "long" if far else "short"))


def choose(family: str, backward: bool, size: int, dtype: torch.dtype, far: bool) -> Config:
    """The configuration of a pass. far: some tiles are far, which means a long sequence."""
    if path := os.environ.get("FASTDEBERTA_TRITON_PROFILE"):
        found = _profile(path).get(key(backward, size, dtype, far))
        if found is not None:
            return found
    return _default(family, backward, size, dtype == torch.float32, far)


@cache
def _profile(path: str) -> dict[str, Config]:
    try:
        entries = json.loads(Path(path).read_text())["configs"]
        return {name: Config.from_dict(values) for name, values in entries.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"FASTDEBERTA_TRITON_PROFILE must name a file that `fastdeberta bench --tune` wrote; "
            f"{path} is not: {error}"
        ) from error


@cache
def _default(family: str, backward: bool, size: int, float32: bool, far: bool) -> Config:
    config = _of_nvidia(family, backward, size, float32)
    if family == "amd":
        # A warp has 64 threads there, and a thread 512 registers.
        launches = {name: Launch(4, how[1]) for name, how in config.launches.items()}
        config = replace(config, **launches)
    return config


def _of_nvidia(family: str, backward: bool, size: int, float32: bool) -> Config:
    if family == "interpreter":
        # Its time goes by the number of operations, not by their size.
        return Config(32, 16, 16, 128, Launch(4, 1))
    if float32:
        # IEEE products run on the ordinary cores, with operands in registers.
        narrow, wide = Launch(4, 1), Launch(8, 1)
        if size <= 64:
            return Config(32, 16, 16, 32, *(narrow,) * 7)
        return Config(16, 16, 16, 32, narrow, wide, wide, wide, wide, narrow, narrow)
    # Half of the columns, where twice as many do not fit registers or shared memory.
    columns = 64 if family in ("sm_86", "sm_89", "sm_120", "amd") else 128
    if size <= 64:
        return Config(64, 16 if family == "sm_120" else 32, 64, columns, Launch(4, 2))
    if size <= 128 and not backward:
        band = Launch(8, 2) if family == "sm_100" else Launch(4, 2)
        return Config(64, 32, 64, 64, band, forward=Launch(8, 2))
    if size <= 128:
        wide = {"near_dkv": Launch(8, 2), "dkv": Launch(8, 2), "table": Launch(8, 2)}
        return Config(32, 16, 64, 64, Launch(4, 2), **wide)
    return Config(32, 16, 32, 64, Launch(4, 1), *(Launch(8, 1),) * 6)


@cache
def family(device: torch.device) -> str:
    """The table's name for a device."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "amd"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
