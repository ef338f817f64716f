"""The CPU kernels beyond the calls that every backend is tested on: every instruction set, tiles
that lie far apart, more threads than heads, long sequences."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from cases import CASES, LINEAR, LOG, V1, V3, Case, by_definition, by_op, make, truth_and_peer
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeberta import RelativePosition, available_backends, disentangled_attention
from fastdeberta.backends import cpu
from fastdeberta.timing import interleaved

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"cpu: {available_backends()['cpu']}"
)

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY_SET = ("avx512-bf16", "avx512", "avx2", "portable")

# Neighbouring distances up to seven rows apart.
JUMPS = RelativePosition(span=16, buckets=16, max_distance=10)

LONG = (
    Case("far-tiles", (700,), heads=1, head_dim=16),
    Case("far-tiles-c2p", (700,), heads=1, head_dim=16, p2c=False),
    Case("far-tiles-p2c", (700,), heads=1, head_dim=16, c2p=False),
    Case("far-tiles-causal", (700,), heads=1, head_dim=16, causal=True),
    Case("far-tiles-dropout", (600,), heads=1, head_dim=16, dropout_p=0.2),
    Case("far-super-tiles", (1300,), heads=1, head_dim=8),
    Case("far-super-tiles-causal", (1300,), heads=1, head_dim=8, causal=True),
    Case("far-super-tiles-left", (1300, 40), heads=1, head_dim=8, mask="left"),
    Case("v3-long", (1100,), heads=1, head_dim=64, position=V3),
    Case("v3-long-ragged", (1100, 3, 600), heads=1, head_dim=24, position=V3, mask="right"),
    Case("v3-packed", (520, 0, 640, 1), heads=2, head_dim=8, position=V3, packed=True),
    Case("v1-long", (1100,), heads=1, head_dim=16, position=V1),
    Case("linear-long", (640,), heads=2, head_dim=8, position=LINEAR),
    Case("c2c-long", (1100,), heads=1, head_dim=16, c2p=False, p2c=False),
    Case("jumps", (65,), position=JUMPS),
    Case("jumps-long", (600,), heads=1, head_dim=8, position=JUMPS),
    Case("head-dim-1", (33,), head_dim=1),
    Case("head-dim-200", (130,), heads=1, head_dim=200),
    Case("head-dim-256", (130,), heads=1, head_dim=256),
    Case("many-heads", (20,), heads=17, head_dim=8),
)


@pytest.fixture(params=EVERY_SET)
def instruction_set(request, monkeypatch) -> str:
    """Each set of instructions, forced."""
    if request.param not in cpu.kernels():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("FASTDEBERTA_CPU_KERNELS", request.param)
    return request.param


def check(case: Case, dtype: torch.dtype) -> None:
    ours = by_op(disentangled_attention, make(case, dtype), "cpu")
    truth, peer = truth_and_peer(case, dtype, "cpu")
    assert_close(ours, peer, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set(case, dtype, instruction_set):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", LONG, ids=str)
def test_far_and_unusual(case, dtype, instruction_set):
    check(case, dtype)


def test_machines_choose_the_fastest_set_that_they_have(monkeypatch):
    assert cpu.kernels()[-1] == "portable"
    assert list(cpu.kernels()) == [name for name in EVERY_SET if name in cpu.kernels()]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert ("avx2" in cpu.kernels()) == (" avx2" in flags)
    assert ("avx512-bf16" in cpu.kernels()) == ("avx512_bf16" in flags)
    monkeypatch.setenv("FASTDEBERTA_CPU_KERNELS", "abacus")
    with pytest.raises(ValueError, match="FASTDEBERTA_CPU_KERNELS must be one of .*'abacus'"):
        check(CASES[0], torch.float32)


rules = st.sampled_from([LOG, cases.CLIPPED, LINEAR, JUMPS, V3])


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([3, 8, 20, 32, 64, 72]),
    terms=st.tuples(st.booleans(), st.booleans()),
    position=rules,
    mask=st.sampled_from(["right", "left", "holes", None]),
    packed=st.booleans(),
    causal=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    softmax_scale=st.sampled_from([None, 0.05]),
    padded_rows=st.sampled_from(["zeros", "uniform"]),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(cpu.kernels() if available_backends()["cpu"] is None else [""]),
)
def test_any_call(lengths, terms, mask, packed, dtype, name, **fields):
    if packed:
        mask = mask and "holes"
    elif mask is None:
        lengths = [max(lengths)] * len(lengths)
    case = Case(
        "any", tuple(lengths), c2p=terms[0], p2c=terms[1], mask=mask, packed=packed, **fields
    )
    call = make(case, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDEBERTA_CPU_KERNELS", name)
        ours = by_op(disentangled_attention, call, "cpu")
    truth = by_definition(call, torch.float64)
    # Two peers, and of each result the worse: the definition keeps its probabilities, the reference
    # makes them again from what the forward pass saved in `dtype`, as kernels do.
    peers = by_definition(call, dtype), by_op(disentangled_attention, call, "reference")
    peer = {
        name: max((p[name] for p in peers), key=lambda x: (x.double() - value).nan_to_num().norm())
        for name, value in truth.items()
    }
    assert_close(ours, peer, truth, dtype)


# Threads


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "case",
    [
        Case("one-document", (1700,), heads=1, head_dim=8, position=V3),
        Case("one-document-causal", (1100,), heads=2, head_dim=8, causal=True),
        Case("few-documents", (1200, 700), heads=1, head_dim=8, mask="right"),
        Case("many-documents", (60, 5, 0, 33, 64, 70, 1), heads=1, head_dim=8, mask="left"),
        Case("packed", (300, 0, 10, 90), heads=1, head_dim=8, packed=True, dropout_p=0.2),
    ],
    ids=str,
)
def test_more_threads_than_heads(case, dtype, threads):
    threads(8)
    check(case, dtype)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_same_bits_every_time(count, threads):
    threads(count)
    case = Case("deterministic", (700, 300), heads=2, head_dim=32, position=V3, mask="right")
    first, second = (
        by_op(disentangled_attention, make(case, torch.float32), "cpu") for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_two_threads_beat_one(threads):
    inputs = cases.random_call(512, dim=64)

    def run(count):
        threads(count)
        disentangled_attention(*inputs, relative_position=LOG, backend="cpu")

    ratios = []
    for _ in range(5):
        times = interleaved({"one": lambda: run(1), "two": lambda: run(2)}, seconds=0.3)
        ratios.append(times["one"] / times["two"])
        if ratios[-1] > 1.4:
            return
    if os.getloadavg()[0] > 1.5 * os.cpu_count():
        pytest.skip(f"the machine is busy with other work: {ratios}")
    assert max(ratios) > 1.2, ratios


# Memory and length

_LONG_DOCUMENT = """
import resource, torch
from fastdeberta import RelativePosition, disentangled_attention
torch.manual_seed(0)
length, rule = {length}, RelativePosition()
q, k, v = (torch.randn(1, length, 1, {dim}) for _ in range(3))
pk, pq = (torch.randn(512, 1, {dim}) for _ in range(2))
small = [x[:, :64].requires_grad_() for x in (q, k, v)]
disentangled_attention(*small, pk, pq, relative_position=rule).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
inputs = [x.requires_grad_({grad}) for x in (q, k, v, pk, pq)]
out = disentangled_attention(*inputs, relative_position=rule, backend="cpu")
if {grad}:
    out.sum().backward()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
# Some rows, by the definition in float64.
q, k, v, pk, pq = (x.detach().double() for x in inputs)
for i in (0, 1, length // 2, length - 1):
    r = rule.row(i - torch.arange(length))
    scores = k[0, :, 0] @ q[0, i, 0] + pk[r, 0] @ q[0, i, 0] + (pq[r, 0] * k[0, :, 0]).sum(-1)
    expected = ((scores / ({dim} * 3) ** 0.5).softmax(0)[:, None] * v[0, :, 0]).sum(0)
    assert (out[0, i, 0] - expected).abs().max() < 1e-5, i
print((peak - before) / 1024, peak / 1024)
"""


def peak_memory(length: int, dim: int, grad: bool) -> tuple[float, float]:
    """MiB above the inputs, and in all, of one call in a process of its own."""
    script = _LONG_DOCUMENT.format(length=length, dim=dim, grad=grad)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    above, total = map(float, result.stdout.split())
    return above, total


@pytest.mark.slow
def test_65536_tokens_in_two_gigabytes():
    above, total = peak_memory(65536, 64, grad=False)
    assert total < 2048
    # The output is 16 MiB; scores alone would be 16 GiB.
    assert above < 64


def test_memory_grows_with_length_alone():
    above, _ = peak_memory(8192, 8, grad=True)
    # Five results of 0.25 MiB each and scratch; one matrix of scores would be 256 MiB.
    assert above < 48


# Other machines


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="no compiler for aarch64 here"
)
@pytest.mark.parametrize("source", ["kernels_portable.cpp", "kernels_avx512_bf16.cpp"])
def test_compiles_for_aarch64(source, tmp_path):
    command = ["aarch64-linux-gnu-g++", "-std=c++17", "-O1", "-c", f"csrc/cpu/{source}"]
    subprocess.run([*command, "-o", tmp_path / "kernels.o"], cwd=ROOT, check=True)
