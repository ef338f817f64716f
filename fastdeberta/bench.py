"""`fastdeberta bench`: the op beside its other backends and torch's attention, on this machine; and
the search for the Triton kernels' configurations."""

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import __version__
from .backends import AttentionParams, available_backends, choose
from .files import write_atomically
from .op import disentangled_attention, explain
from .relative_position import RelativePosition
from .timing import interleaved

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = {
    "cuda": ("1x32", "1x128", "8x128", "1x512", "4x512", "2x2048"),
    "cpu": ("1x32", "1x128", "8x128", "1x512"),
}
PASSES = ("forward", "forward+backward")
SDPA = "sdpa"

PROFILE = Path("runs/triton-profile.json")

# Tuned for: sequences without and with far tiles, as [batch, length] that keep a device busy.
TUNED = {"short": (32, 512), "long": (4, 4096)}

# DeBERTaV3-base's attention.
_RULE = RelativePosition()
_HEADS, _HEAD_DIM = 12, 64

# Elsewhere these backends are executed by a slow stand-in, for tests, or not at all.
_MADE_FOR = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda", "simt": "nowhere"}

# Seconds of calls in a row of one rival.
_TURN = 0.02

_say = partial(print, flush=True)


@dataclass(frozen=True)
class Case:
    """One row of the report.

    auto: the backend that "auto" takes. milliseconds: of "auto", the other backends, and SDPA.
    left_out: backends that refuse the call, with their reasons.
    """

    dtype: str
    part: str
    shape: str
    auto: str
    milliseconds: dict[str, float]
    left_out: dict[str, str]


def run(
    device: str | None = None,
    seconds: float = 1.0,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    file: Path | None = None,
    report: Callable[[str], None] = _say,
) -> list[Case]:
    """Times attention of DeBERTaV3-base's size and reports one row a case as it comes.

    Args:
        device: "cpu" or "cuda"; None: "cuda" where there is one.
        seconds: of timing for each case, in which rivals take turns.
        shapes: "BxL", batch and length; None: those of SHAPES.
        dtypes: of DTYPES; None: bf16 and fp32.
        file: where the same goes as JSON, if anywhere.

    Raises:
        ValueError: a device, shape or dtype that does not fit; the message names it.
    """
    where = _device(device)
    sizes = {shape: _size(shape) for shape in shapes or SHAPES[where.type]}
    names = _known_dtypes(dtypes or ("bf16", "fp32"))
    others = _others(where)
    report(f"{_name(where)}; torch {torch.__version__}")
    report("ms: what auto takes; the others are multiples of it, above 1 where auto is faster")
    report(f"{SDPA}: torch's attention, without positions")
    report(_line(("", "auto", "ms", *others)))
    cases = []
    with torch.cuda.device(where) if where.type == "cuda" else nullcontext():
        for name in names:
            for part in PASSES:
                for shape, size in sizes.items():
                    case = _case(name, part, shape, size, where, seconds, others)
                    cases.append(case)
                    report(_line((f"{name} {part} {shape}", *_cells(case, others))))
    left_out = {name: reason for case in cases for name, reason in case.left_out.items()}
    for name, reason in left_out.items():
        report(f"- {name} (-): {reason}")
    if file is not None:
        versions = {"fastdeberta": __version__, "torch": torch.__version__}
        results = {"device": _name(where), **versions, "seconds": seconds}
        results |= {"heads": _HEADS, "head_dim": _HEAD_DIM, "cases": list(map(asdict, cases))}
        write_atomically(file, json.dumps(results, indent=2) + "\n")
        report(f"written: {file}")
    return cases


def _case(
    dtype: str,
    part: str,
    shape: str,
    size: tuple[int, int],
    device: torch.device,
    seconds: float,
    others: Sequence[str],
) -> Case:
    batch, length = size
    content = (batch, length, _HEADS, _HEAD_DIM)
    table = (2 * _RULE.span, _HEADS, _HEAD_DIM)
    tensors = [
        torch.randn(dims, device=device).to(DTYPES[dtype]).requires_grad_(part != "forward")
        for dims in (content, content, content, table, table)
    ]
    dout = torch.randn(content, device=device).to(DTYPES[dtype])
    auto = explain(*tensors, relative_position=_RULE).backend

    def ours(backend: str) -> Callable[[], Any]:
        return _pass(part, tensors, dout, lambda *x: _attend(x, backend))

    rivals, left_out = {"auto": ours("auto")}, {}
    for name in others:
        if name == auto:
            continue
        call = _pass(part, tensors[:3], dout, _sdpa) if name == SDPA else ours(name)
        try:
            call()
        except (ValueError, torch.OutOfMemoryError) as error:
            left_out[name] = str(error).splitlines()[0]
        else:
            rivals[name] = call
    times = interleaved(rivals, seconds, device=device.type, turn=_TURN)
    return Case(dtype, part, shape, auto, times, left_out)


def _attend(tensors: tuple[Tensor, ...], backend: str) -> Tensor:
    out = disentangled_attention(*tensors, relative_position=_RULE, backend=backend)
    assert isinstance(out, Tensor)
    return out


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _pass(
    part: str, tensors: Sequence[Tensor], dout: Tensor, attention: Callable[..., Tensor]
) -> Callable[[], Any]:
    if part == "forward":
        return lambda: attention(*tensors)
    return lambda: torch.autograd.grad(attention(*tensors), tensors, dout)


def _others(device: torch.device) -> list[str]:
    """What is timed beside "auto": every backend of use on the device, and torch's attention."""
    return [
        *(
            name
            for name, reason in available_backends().items()
            if reason is None and _MADE_FOR.get(name, device.type) == device.type
        ),
        SDPA,
    ]


def _cells(case: Case, others: Sequence[str]) -> Iterator[str]:
    yield case.auto
    ours = case.milliseconds["auto"]
    yield f"{ours:.3g}"
    for name in others:
        time = case.milliseconds.get(name)
        yield "auto" if name == case.auto else "-" if time is None else f"{time / ours:.2f}x"


def _line(cells: Iterable[str]) -> str:
    first, *others = cells
    return f"{first:<28}" + "".join(f"{cell:>11}" for cell in others)


def tune(
    device: str | None = None,
    seconds: float = 1.0,
    head_dims: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    candidates: int | None = None,
    out: Path | None = None,
    report: Callable[[str], None] = _say,
) -> None:
    """Searches the Triton kernels' configurations and writes a profile of the fastest.

    The profile is written after every pass, so that an interrupted search leaves what it found.
    Entries of the same device and triton that it already has are kept.

    Args:
        seconds: of the last comparison of each pass. head_dims: 64 if None.
        dtypes: bf16 and fp16 if None. candidates: configurations of a pass, at most.
        out: the profile; None: PROFILE.

    Raises:
        ValueError: no CUDA device, no triton, or an argument that does not fit.
    """
    where = _tunable(device)
    sizes = head_dims or (_HEAD_DIM,)
    if unfit := [size for size in sizes if not 1 <= size <= 256]:
        raise ValueError(f"head-dim must be between 1 and 256, got {unfit[0]}")
    names = _known_dtypes(dtypes or ("bf16", "fp16"))
    out = out or PROFILE
    import triton

    from .backends.triton import tuning

    profile = _Profile.read(out, _name(where), triton.__version__)

    def clock(rivals: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
        return interleaved(rivals, seconds, device="cuda", turn=_TURN)

    with torch.cuda.device(where):
        for size in sizes:
            for name in names:
                for batch, length in TUNED.values():
                    for backward in (False, True):
                        call = tuning.example(
                            backward, size, DTYPES[name], batch, length, _HEADS, where
                        )
                        limit = tuning.LIMIT if candidates is None else candidates
                        tuned = tuning.tune(call, clock, seconds, limit)
                        report(verdict(tuned, f"{batch}x{length}"))
                        profile.add(tuned.key, asdict(tuned.config), tuned.times)
                        profile.write(out)
    report(f"written: {out}; to use it:")
    report(f"export FASTDEBERTA_TRITON_PROFILE={out.resolve()}")


@dataclass
class _Profile:
    """milliseconds: by key, under the configuration that was in use and under this one."""

    device: str
    triton: str
    configs: dict[str, dict[str, Any]]
    milliseconds: dict[str, tuple[float, float]]

    @classmethod
    def read(cls, path: Path, device: str, triton: str) -> "_Profile":
        fresh = cls(device, triton, {}, {})
        if not path.exists():
            return fresh
        try:
            old = cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"out: {path} is there and is no profile: {error}") from None
        return old if (old.device, old.triton) == (device, triton) else fresh

    def add(self, key: str, config: dict[str, Any], times: tuple[float, float]) -> None:
        self.configs[key] = config
        self.milliseconds[key] = times

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")


def verdict(tuned: Any, shape: str) -> str:
    """One line on a pass that was tuned (a tuning.Tuned)."""
    before, after = tuned.times
    changes = [
        f"{field.name} {_text(old)} -> {_text(new)}"
        for field in fields(tuned.start)
        if (old := getattr(tuned.start, field.name)) != (new := getattr(tuned.config, field.name))
    ]
    line = f"{tuned.key}, {shape}: "
    if changes:
        line += f"{before:.3g} ms -> {after:.3g} ms ({before / after:.2f}x): {', '.join(changes)}"
    else:
        line += f"{before:.3g} ms, and nothing faster"
    line += f"; {tuned.tried} tried, {tuned.refused} refused"
    if tuned.wrong:
        line += f", {tuned.wrong} computed something else"
    return line


def _text(value: Any) -> str:
    return f"{value[0]} warps {value[1]} stages" if isinstance(value, tuple) else str(value)


def _tunable(device: str | None) -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError("bench --tune needs a CUDA device: torch finds none")
    where = _device(device)
    if where.type != "cuda":
        raise ValueError(f"bench --tune needs a CUDA device: --device is {device!r}")
    if reason := available_backends()["triton"]:
        raise ValueError(f"bench --tune needs triton: {reason}")
    query = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=where)
    choose("triton", query, AttentionParams(None, None, None, None, 1, False, 0.0, 1.0, False))
    return where


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: no {name!r} here: {str(error).splitlines()[0]}") from None
    if device.type not in SHAPES:
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    return device


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def _size(shape: str) -> tuple[int, int]:
    words = shape.split("x")
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"shape must be BxL, batch and length, as in 4x512; got {shape!r}")
    return int(words[0]), int(words[1])


def _known_dtypes(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    return list(dict.fromkeys(names))
