"""The search for a device's launch configurations: from the one in use, a field at a time.

Candidates that the device or the compiler refuses, or that compute something else, are passed over.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from math import inf

import torch
from torch import Tensor
from triton.errors import TritonError

from ...relative_position import RelativePosition
from .. import AttentionParams
from . import configs, launch
from .configs import Config, Launch

Call = Callable[[], tuple[Tensor | None, ...]]
Axis = Callable[[Config], list[Config]]
# Of functions by name and seconds in all: median milliseconds of each.
Clock = Callable[[Mapping[str, Call], float], Mapping[str, float]]

# Candidates of a pass, and how much faster one must be than the best before it, against noise.
LIMIT = 30
GAIN = 0.02

# Seconds of timing for a candidate.
_GLANCE = 0.1

# Kernels that take the most time come first.
_MAIN = {False: ("forward",), True: ("dq", "near_dkv", "dkv")}
_OTHERS = {False: ("band",), True: ("table", "content", "band")}


@dataclass(frozen=True)
class Found:
    """The fastest configuration, its milliseconds, and how many were measured and refused."""

    config: Config
    milliseconds: float
    tried: int
    refused: int


@dataclass(frozen=True)
class Tuned:
    """A pass under the configuration that was in use and under the fastest, which may be the same.

    key: the configuration's name in a profile. times: milliseconds of `start` and `config`.
    """

    key: str
    start: Config
    config: Config
    times: tuple[float, float]
    tried: int
    refused: int
    wrong: int


class _Candidate(Config):
    """A configuration that is taken as it is or refused, never replaced by a smaller one."""

    def smaller(self) -> None:
        return None


def axes(backward: bool, head_dim: int, far: bool) -> list[Axis]:
    """What varies, each a function from a configuration to its neighbours along one field.

    far: the call has far tiles, without which dkv_kernel has nothing to do.
    """
    main = [name for name in _MAIN[backward] if far or name != "dkv"]
    sides = (32, 64, 128) if head_dim <= 128 else (32, 64)

    def block(config: Config) -> list[Config]:
        # Large tiles need more warps to hold them, so that one alone would not be seen at its best.
        found = []
        for side in sides:
            steps = _steps(side) if backward else [config.step]
            nearest = min(steps, key=lambda step: abs(step - config.step))
            for warps in (4, 8):
                launches = {name: Launch(warps, getattr(config, name).stages) for name in main}
                found.append(replace(config, block=side, step=nearest, **launches))
        return found

    def step(config: Config) -> list[Config]:
        return [replace(config, step=step) for step in _steps(config.block)]

    def launches(name: str) -> Axis:
        def neighbours(config: Config) -> list[Config]:
            warps, stages = getattr(config, name)
            others = [Launch(12 - warps if warps in (4, 8) else 4, stages)]
            others += [Launch(warps, count) for count in (1, 2, 3)]
            return [replace(config, **{name: other}) for other in others]

        return neighbours

    def halved_and_doubled(name: str, least: int, most: int) -> Axis:
        def neighbours(config: Config) -> list[Config]:
            value = getattr(config, name)
            sizes = [size for size in (value // 2, value * 2) if least <= size <= most]
            return [replace(config, **{name: size}) for size in sizes]

        return neighbours

    return [
        block,
        *([step] if backward else []),
        *map(launches, main),
        halved_and_doubled("columns", 32, 256),
        halved_and_doubled("rows", 16, 128),
        *map(launches, _OTHERS[backward]),
    ]


def _steps(block: int) -> list[int]:
    """Half a tile or a whole one, of those that registers have room for."""
    return [step for step in (block // 2, block) if 16 <= step <= 64]


def search(
    start: Config,
    axes: Sequence[Axis],
    measure: Callable[[Config], float | None],
    limit: int = LIMIT,
    gain: float = GAIN,
) -> Found:
    """Coordinate descent: along each axis in turn to the fastest, until none brings anything.

    Args:
        start: where it begins; a smaller one where this is refused.
        measure: milliseconds of a configuration, None where it cannot be used. No configuration
            is measured twice.
        limit: configurations measured, at most.
        gain: a configuration is faster if it takes this much less, as a share of the time.

    Raises:
        RuntimeError: neither `start` nor a smaller one can be used.
    """
    times: dict[Config, float] = {}

    def timed(config: Config) -> float:
        if config not in times:
            milliseconds = measure(config)
            times[config] = inf if milliseconds is None else milliseconds
        return times[config]

    best: Config = start
    while timed(best) == inf:
        smaller = best.smaller()
        if smaller is None:
            raise RuntimeError("the device refuses every configuration, also the smallest")
        best = smaller
    while True:
        before = best
        for axis in axes:
            new = [config for config in dict.fromkeys(axis(best)) if config not in times]
            fastest = min(new[: max(0, limit - len(times))], key=timed, default=best)
            if timed(fastest) < timed(best) * (1 - gain):
                best = fastest
        if best == before or len(times) >= limit:
            refused = sum(time == inf for time in times.values())
            return Found(best, times[best], len(times), refused)


def example(
    backward: bool,
    head_dim: int,
    dtype: torch.dtype,
    batch: int,
    length: int,
    heads: int = 12,
    device: str | torch.device = "cuda",
    rule: RelativePosition | None = None,
) -> Call:
    """One pass, forward or backward, of random tensors. rule: of positions; DeBERTaV3's if None."""
    rule = rule or RelativePosition()
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int) -> Tensor:
        x = torch.randn(rows, heads, head_dim, device=device, generator=generator)
        return x.to(dtype)

    tensors = [normal(rows) for rows in (*(batch * length,) * 3, *(2 * rule.span,) * 2)]
    params = AttentionParams(
        cu_seqlens=None,
        key_mask=None,
        rows=rule.table(device),
        rng_state=None,
        max_seqlen=length,
        causal=False,
        dropout_p=0.0,
        softmax_scale=(3 * head_dim) ** -0.5,
        uniform_padding=False,
    )
    if not backward:
        return lambda: launch.forward(*tensors, params)
    dout = normal(batch * length)
    out, lse = launch.forward(*tensors, params)
    return lambda: launch.backward(dout, *tensors, out, lse, params)


def tune(call: Call, clock: Clock, seconds: float, limit: int = LIMIT) -> Tuned:
    """The fastest configuration of one pass. seconds: of its last comparison with the one in use.

    Raises:
        RuntimeError: the device was lost, or refuses every configuration.
    """
    (backward, size, dtype, far), start, expected = _in_use(call)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-4)
    wrong = 0

    def measure(config: Config) -> float | None:
        nonlocal wrong
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        run = under(_Candidate(**values), call)
        try:
            results = run()
            _wait()
        except (TritonError, RuntimeError):
            _wait()  # Raises once more where the device is lost.
            return None
        if not _same(results, expected, tolerance):
            wrong += 1
            return None
        del results
        return clock({"": run}, _GLANCE)[""]

    found = search(start, axes(backward, size, far), measure, limit)
    best, times = found.config, (found.milliseconds,) * 2
    if best != start:
        both = clock({"start": under(start, call), "best": under(best, call)}, seconds)
        times = both["start"], both["best"]
        if times[1] >= times[0]:
            best, times = start, (times[0],) * 2
    key = configs.key(backward, size, dtype, far)
    return Tuned(key, start, best, times, found.tried, found.refused - wrong, wrong)


def under(config: Config, call: Call) -> Call:
    """The same call, whose passes take this configuration."""

    def run() -> tuple[Tensor | None, ...]:
        with _choosing(lambda *_: config):
            return call()

    return run


def _in_use(call: Call) -> tuple[tuple, Config, tuple[Tensor | None, ...]]:
    """What a pass asks `configs.choose` for beside a device's family; its answer; the results."""
    asked = []
    choose = configs.choose

    def noting(family: str, *what) -> Config:
        asked.append((what, choose(family, *what)))
        return asked[-1][1]

    with _choosing(noting):
        results = call()
    return *asked[-1], results


@contextmanager
def _choosing(choose: Callable[..., Config]) -> Iterator[None]:
    before = configs.choose
    configs.choose = choose
    try:
        yield
    finally:
        configs.choose = before


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _same(
    results: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...], tolerance: float
) -> bool:
    """Whether results differ by no more than this share of the largest value expected."""
    for a, b in zip(results, expected, strict=True):
        if a is None or b is None:
            continue
        difference = (a.float() - b.float()).abs().max()
        if not difference <= tolerance * b.float().abs().max():  # NaN is not the same.
            return False
    return True
