"""Distance -> bucket -> table row: the only copy of that rule."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RowTable(NamedTuple):
    """Rows of the distances between saturation and saturation; beyond either, the row is constant.

    rows: int32 [last - first + 1]; rows[x - first] is the table row of distance x.
    first, last: the saturation distances. x < first reads rows[0], x > last reads rows[-1].
    """

    rows: Tensor
    first: int
    last: int

    def lookup(self, distance: Tensor) -> Tensor:
        """Rows (int64) of any distances (integer tensor), any shape."""
        return self.rows[distance.clamp(self.first, self.last) - self.first].long()


@dataclass(frozen=True)
class RelativePosition:
    """How the distance i - j chooses a row of the relative-position table.

    row = clamp(bucket(i - j) + span, 0, 2 * span - 1)

    Args:
        span: half the table; the table has 2 * span rows.
        buckets: None keeps the distance as it is (DeBERTa v1). Otherwise distances up to
            buckets // 2 are kept and longer ones share logarithmic buckets (v2, v3); must equal
            `span`, as in every released checkpoint.
        max_distance: the distance at which the logarithmic buckets reach the end of the table.
        clip_distance: clip distances to +-(max_distance - 1) first, as microsoft/DeBERTa does.
            transformers does not, so its row 0 (and not 1) serves distances <= -max_distance.

    Raises:
        ValueError: a value outside what is described above.

    Source: DeBERTa, section 3.1, eq. 3; log buckets: DeBERTa-v2 checkpoints.
    """

    span: int = 256
    buckets: int | None = 256
    max_distance: int = 512
    clip_distance: bool = False

    def __post_init__(self) -> None:
        if self.span < 1:
            raise ValueError(f"span must be at least 1, got {self.span}")
        if self.buckets is None:
            return
        if self.buckets != self.span or self.buckets < 4 or self.buckets % 2:
            raise ValueError(
                "buckets must be None (linear positions) or an even number of at least 4 equal to "
                f"span ({self.span}), got {self.buckets}"
            )
        if self.max_distance < self.buckets // 2 + 2:
            raise ValueError(
                f"max_distance must exceed buckets // 2 + 1 = {self.buckets // 2 + 1}, "
                f"got {self.max_distance}"
            )

    @classmethod
    def from_config(cls, config: Any) -> "RelativePosition":
        """The rule of a transformers or fastdeberta config (DeBERTa v1, v2 or v3)."""
        max_distance = getattr(config, "max_relative_positions", -1)
        if max_distance < 1:
            max_distance = config.max_position_embeddings
        buckets = getattr(config, "position_buckets", -1)
        if buckets < 1 or getattr(config, "model_type", "") == "deberta":
            return cls(span=max_distance, buckets=None, max_distance=max_distance)
        return cls(span=buckets, buckets=buckets, max_distance=max_distance)

    @property
    def ints(self) -> list[int]:
        """The rule as integers: the form in which it crosses the operator's schema."""
        return [self.span, self.buckets or 0, self.max_distance, int(self.clip_distance)]

    @classmethod
    def from_ints(cls, ints: list[int]) -> "RelativePosition":
        """Inverse of `ints`."""
        span, buckets, max_distance, clip = ints
        return cls(span, buckets or None, max_distance, bool(clip))

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket (int64) of each distance i - j (integer tensor, any shape)."""
        distance = distance.long()
        if self.clip_distance:
            distance = distance.clamp(1 - self.max_distance, self.max_distance - 1)
        if self.buckets is None:
            return distance
        mid = self.buckets // 2
        size = distance.abs()
        # float32 and this order of operations decide on which side of ceil() a distance falls.
        ratio = torch.log(size.clamp(min=mid) / mid) / torch.log(
            torch.tensor((self.max_distance - 1) / mid)
        )
        log_bucket = (torch.ceil(ratio * (mid - 1)) + mid).long() * distance.sign()
        return torch.where(size <= mid, distance, log_bucket)

    def row(self, distance: Tensor) -> Tensor:
        """Table row (int64) of each distance i - j (integer tensor, any shape)."""
        return (self.bucket(distance) + self.span).clamp(0, 2 * self.span - 1)

    def table(self, device: torch.device | str = "cpu") -> RowTable:
        """The rule as a table on `device`; made once for each rule and device."""
        return _row_table(self, torch.device(device))

    def _reach(self) -> int:
        """A distance beyond which, on either side, the row is constant."""
        if self.clip_distance:
            return self.max_distance
        if self.buckets is None:
            return self.span
        # Buckets end at max_distance; float32 logarithms may put that off by a rounding error.
        return self.max_distance + self.max_distance // 1000 + 1


@lru_cache(maxsize=64)
def _row_table(rule: RelativePosition, device: torch.device) -> RowTable:
    reach = rule._reach()
    # Always computed on the CPU, so that no two devices can disagree about a logarithm.
    with torch.device("cpu"):
        rows = rule.row(torch.arange(-reach, reach + 1))
    first = int((rows != rows[0]).nonzero()[0]) - 1
    last = int((rows != rows[-1]).nonzero()[-1]) + 1
    table = rows[first : last + 1].to(device=device, dtype=torch.int32)
    return RowTable(table, first - reach, last - reach)
