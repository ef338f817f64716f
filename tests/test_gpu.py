"""What only a GPU can show: determinism, CUDA graphs, waiting, streams, memory, long sequences.

Whether results are right is test_op.py's matter, on every backend.
"""

import gc
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from cases import V3
from closeness import assert_close
from torch import Tensor

from fastdeberta import available_backends, disentangled_attention

pytestmark = pytest.mark.gpu

BACKEND = ""  # set for each test
HEADS, HEAD_DIM = 12, 64


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def _usable(request, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "BACKEND", request.param)
    if reason := available_backends()[BACKEND]:
        pytest.skip(f"{BACKEND}: {reason}")
    if BACKEND == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 runs kernels on the CPU")


@dataclass(frozen=True)
class Call:
    """tensors: query, key, value, pos_key, pos_query. dout: the gradient that comes back."""

    tensors: tuple[Tensor, ...]
    dout: Tensor
    options: dict

    @classmethod
    def random(
        cls,
        batch: int,
        length: int,
        heads: int = HEADS,
        dtype: torch.dtype = torch.bfloat16,
        **options: object,
    ) -> "Call":
        def normal(*leading: int) -> Tensor:
            x = torch.randn(*leading, heads, HEAD_DIM, device="cuda")
            return x.to(dtype).requires_grad_()

        content = [normal(batch, length) for _ in range(3)]
        tables = [normal(2 * V3.span) for _ in range(2)]
        dout = normal(batch, length).detach()
        return cls((*content, *tables), dout, options)

    def to(self, device: str) -> "Call":
        tensors = (x.detach().to(device).requires_grad_() for x in self.tensors)
        return Call(tuple(tensors), self.dout.to(device), self.options)

    def attend(self) -> Tensor:
        return disentangled_attention(
            *self.tensors, relative_position=V3, backend=BACKEND, **self.options
        )

    def forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (self.attend(),)

    def both(self) -> tuple[Tensor, ...]:
        """out and the gradients of all tensors."""
        out = self.attend()
        return out.detach(), *torch.autograd.grad(out, self.tensors, self.dout)


def run(call: Call, part: str) -> Callable[[], tuple[Tensor, ...]]:
    return call.forward if part == "forward" else call.both


PARTS = pytest.mark.parametrize("part", ["forward", "forward+backward"])


def ragged(batch: int, length: int) -> Tensor:
    """A mask [B, L] of right padding; the first sequence is whole."""
    lengths = length - torch.arange(batch, device="cuda") * (length // (2 * batch))
    return torch.arange(length, device="cuda") < lengths[:, None]


def assert_equal(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Bit by bit, NaN being equal to nothing."""
    names = ("out", "dquery", "dkey", "dvalue", "dpos_key", "dpos_query")
    same = [torch.equal(a, b) for a, b in zip(results, expected, strict=True)]
    assert all(same), f"differ: {[n for n, s in zip(names, same, strict=False) if not s]}"


@pytest.mark.parametrize("masked", [True, False], ids=["4x512-mask-dropout", "1x2048"])
def test_two_runs_are_equal_bit_by_bit(masked):
    if masked:
        call = Call.random(4, 512, key_mask=ragged(4, 512), dropout_p=0.1)
    else:
        call = Call.random(1, 2048)

    def once() -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        return call.both()

    expected = once()
    busy = torch.randn(2048, 2048, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):  # Beside these, programs are placed and ordered otherwise.
            busy @ busy
    assert_equal(once(), expected)
    torch.cuda.synchronize()
    assert_equal(once(), expected)


def captured(
    function: Callable[[], tuple[Tensor, ...]],
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of function(), and the tensors that every replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # Compiles, and makes what is kept between calls.
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@PARTS
@pytest.mark.parametrize("shape", [(4, 512), (1, 2048)], ids=["4x512-mask", "1x2048"])
def test_a_graph_replays_what_a_call_computes(part, shape):
    options = {"key_mask": ragged(*shape)} if shape[0] > 1 else {}
    call = Call.random(*shape, **options)
    graph, results = captured(run(call, part))
    with torch.no_grad():
        for x in (*call.tensors, call.dout):
            x.normal_()
    graph.replay()
    assert_equal(results, run(call, part)())


def test_replays_draw_dropout_anew():
    call = Call.random(4, 512, dropout_p=0.5)
    graph, (out, _, _, dvalue, *_) = captured(call.both)
    value, outs = call.tensors[2].detach(), []
    for _ in range(3):
        graph.replay()
        outs.append(out.clone())
        # out is linear in value: both passes dropped the same if <dout, out> = <dvalue, value>.
        ahead, back = call.dout.double() * out.double(), value.double() * dvalue.double()
        assert (ahead.sum() - back.sum()).abs() < 0.05 * ahead.norm()
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(outs[a], outs[b])


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_call_waits_for_the_device(packed):
    call = Call.random(4, 512, dropout_p=0.1, key_mask=ragged(4, 512))
    if packed:
        tensors = [x.detach().flatten(0, 1).requires_grad_() for x in call.tensors[:3]]
        ends = torch.tensor([0, 512, 513, 1500, 2048], dtype=torch.int32, device="cuda")
        options = {"cu_seqlens": ends, "max_seqlen": 987, "dropout_p": 0.1}
        call = Call((*tensors, *call.tensors[3:]), call.dout.flatten(0, 1), options)
    call.both()
    call.forward()
    with waiting_is_an_error():
        call.both()
        call.forward()


def test_the_current_stream_is_used():
    """Work on any other stream would overtake the sleep and the copies."""
    fresh, call = Call.random(2, 512), Call.random(2, 512)
    expected = fresh.both()
    call.both()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**8)  # Cycles.
        with torch.no_grad():
            for x, y in zip((*call.tensors, call.dout), (*fresh.tensors, fresh.dout), strict=True):
                x.copy_(y)
        results = call.both()
    side.synchronize()
    assert_equal(results, expected)


def test_a_device_that_is_not_current():
    names = {torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
    if torch.cuda.device_count() < 2 or len(names) > 1:
        pytest.skip("needs two CUDA devices of one kind")
    call = Call.random(2, 300)
    expected = call.both()
    with torch.cuda.device(0):
        results = call.to("cuda:1").both()
    assert all(x.device == torch.device("cuda:1") for x in results)
    assert_equal(tuple(x.to("cuda:0") for x in results), expected)


@PARTS
def test_memory_grows_by_tokens_alone(part):
    """A token takes its results, sums of its gradients in float32, and a few numbers a head. One
    row of position scores for each term, 2 * span of them, would be several times that.

    A workspace of fixed size, no larger than the device's cache, may be used to the full or not.
    """
    call_bytes = 2 * HEAD_DIM + 4  # out and lse
    if part != "forward":
        call_bytes += 3 * (2 + 4) * HEAD_DIM + 64  # gradients of query, key and value, and sums
    lengths = (2048, 16384)
    short, long = (peak(run(Call.random(1, length), part)) for length in lengths)
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
    workspace = max(32 * 2**20, cache)
    more_tokens = lengths[1] - lengths[0]
    assert long - short <= more_tokens * HEADS * call_bytes + workspace
    assert long <= lengths[1] / lengths[0] * short


def peak(function: Callable[[], object]) -> int:
    """Bytes that a call takes beyond what is there, the first call apart."""
    function()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_65536_tokens():
    length, dtype = 65536, torch.bfloat16
    call = Call.random(1, length, heads=1)
    out, *grads = call.both()
    assert all(x.isfinite().all() for x in grads)
    # Probabilities of a query sum up to 1, so its dout arrives at the values undivided.
    arrived, sent = (x.double().sum((0, 1, 2)) for x in (grads[2], call.dout))
    assert (arrived - sent).norm() < 0.02 * sent.norm()

    queries = torch.tensor([0, 1, 511, 777, 32768, length - 1], device="cuda")
    truth, peer = (rows_of(call, queries, x) for x in (torch.float64, dtype))
    assert_close({"out": out[0, queries, 0]}, {"out": peer}, {"out": truth}, dtype)


def rows_of(call: Call, queries: Tensor, dtype: torch.dtype) -> Tensor:
    """out [n, D] of some queries of one sequence with one head, computed in `dtype`."""
    tensors = (x.detach().to(dtype).squeeze(0).squeeze(1) for x in call.tensors)
    query, key, value, pos_key, pos_query = tensors
    query = query[queries]
    row = V3.row((queries[:, None] - torch.arange(key.size(0), device="cuda")).cpu()).to("cuda")
    c2p = (query @ pos_key.T).gather(1, row)
    p2c = (key @ pos_query.T).T.gather(0, row)
    scores = (query @ key.T + c2p + p2c) / math.sqrt(3 * HEAD_DIM)
    return scores.softmax(-1) @ value
