"""`fastdeberta bench`: the report, and the search for the Triton kernels' configurations."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from math import log2

import pytest
import torch
from cases import LOG

from fastdeberta import RelativePosition, available_backends, bench, cli, disentangled_attention

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
WITH_TRITON = available_backends()["triton"] is None

if WITH_TRITON:
    from triton.runtime.errors import OutOfResources

    from fastdeberta.backends.triton import configs, launch, tuning
    from fastdeberta.backends.triton.configs import Config, Launch

    START = Config(64, 32, 64, 128, Launch(4, 2))

needs_triton = pytest.mark.skipif(
    not WITH_TRITON, reason=f"triton: {available_backends()['triton']}"
)


def run(capsys, *arguments):
    """Exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


# The report

QUICK = ("--device", "cpu", "--seconds", "0", "--shape", "2x16", "--dtype", "fp32")


def test_report(tmp_path, capsys):
    file = tmp_path / "results" / "bench.json"
    status, out, err = run(capsys, *QUICK, "--json", str(file))
    assert (status, err) == (0, "")
    _, _, _, header, forward, both, written = out.splitlines()
    columns = header.split()
    assert columns[:2] == ["auto", "ms"] and columns[-1] == "sdpa" and "reference" in columns
    assert "triton" not in columns
    assert forward.startswith("fp32 forward 2x16 ")
    assert both.startswith("fp32 forward+backward 2x16 ")
    assert len(forward.split()) == len(columns) + 3
    assert written == f"written: {file}"
    results = json.loads(file.read_text())
    assert [case["part"] for case in results["cases"]] == ["forward", "forward+backward"]
    for case in results["cases"]:
        assert {"auto", "sdpa"} <= case["milliseconds"].keys()
        assert all(time > 0 for time in case["milliseconds"].values())


def test_a_backend_that_refuses_is_left_out_with_its_reason(monkeypatch):
    def attend(tensors, name):
        if name == "reference":
            raise ValueError("too plain\nfor this")
        return tensors[0] + sum(x.sum() for x in tensors)

    monkeypatch.setattr(bench, "_attend", attend)
    monkeypatch.setattr(bench, "available_backends", lambda: dict.fromkeys(("cpu", "reference")))
    lines = []
    cases = bench.run("cpu", 0.0, ["1x4"], ["fp32"], report=lines.append)
    if cases[0].auto == "reference":
        pytest.skip("auto takes the reference here")
    assert lines[-1] == "- reference (-): too plain"
    assert all(line.split()[-2] == "-" for line in lines[-3:-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "nope"), "device: no 'nope' here: "),
        (("--device", "meta"), "device must be cpu or cuda, got 'meta'"),
        (("--shape", "512"), "shape must be BxL, batch and length, as in 4x512; got '512'"),
        (("--shape", "0x8"), "shape must be BxL, batch and length, as in 4x512; got '0x8'"),
        (("--dtype", "int8"), "dtype must be one of bf16, fp16, fp32; got 'int8'"),
        (("--out", "file"), "--out has no meaning without --tune"),
        (("--head-dim", "64"), "--head-dim has no meaning without --tune"),
        (("--tune", "--shape", "1x8"), "--shape has no meaning with --tune"),
        (("--tune", "--json", "file"), "--json has no meaning with --tune"),
    ],
)
def test_bad_input(arguments, message, capsys):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"fastdeberta: {message}") and err.count("\n") == 1


def test_tuning_needs_a_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "fastdeberta: bench --tune needs a CUDA device: torch finds none\n"
    assert run(capsys, "--tune") == (2, "", message)


def test_tuning_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    message = "fastdeberta: bench --tune needs a CUDA device: --device is 'cpu'\n"
    assert run(capsys, "--tune", "--device", "cpu") == (2, "", message)


def test_help(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(option in out for option in ("--device", "--json", "--tune", "--out"))


# The search


def distance(config, target):
    """Factors of two between sizes, and launches that differ."""
    sizes = ("block", "step", "rows", "columns")
    launches = ("band", "forward", "dq", "near_dkv", "dkv", "content", "table")
    apart = sum(abs(log2(getattr(config, name) / getattr(target, name))) for name in sizes)
    for name in launches:
        ours, theirs = getattr(config, name), getattr(target, name)
        apart += (ours.warps != theirs.warps) + abs(ours.stages - theirs.stages)
    return apart


@needs_triton
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_search_finds_what_is_fastest(backward):
    eight = dict.fromkeys(("dq", "near_dkv", "dkv") if backward else ("forward",), Launch(8, 3))
    step = 64 if backward else START.step  # Only the backward pass has steps.
    target = replace(START, block=128, step=step, rows=32, columns=64, band=Launch(8, 1), **eight)
    found = tuning.search(
        START, tuning.axes(backward, 64, True), lambda c: 1.0 + distance(c, target), limit=200
    )
    assert found.config == target
    assert found.milliseconds == 1.0 and found.refused == 0


@needs_triton
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_candidates_are_valid_few_and_measured_once(backward, head_dim):
    measured = []

    def measure(config):
        measured.append(config)
        return 100.0 / len(measured)  # Each is faster than all before it.

    found = tuning.search(START, tuning.axes(backward, head_dim, True), measure)
    assert found.tried == len(measured) == len(set(measured)) == tuning.LIMIT
    assert found.config == measured[-1]
    for config in measured[1:]:
        assert config.block in ((32, 64, 128) if head_dim == 64 else (32, 64))
        assert config.step in ((config.block // 2, config.block) if backward else (START.step,))
        assert 16 <= config.rows <= 128 and 32 <= config.columns <= 256
        for name in ("band", "forward", "dq", "near_dkv", "dkv", "content", "table"):
            warps, stages = getattr(config, name)
            assert warps in (4, 8) and stages in (1, 2, 3)


@needs_triton
def test_search_passes_over_what_is_refused():
    def measure(config):
        return None if config.block > 32 else float(config.rows)

    found = tuning.search(START, tuning.axes(False, 64, False), measure)
    # The start's own smaller relatives: one stage, then half of the tiles.
    assert found.config == replace(START.smaller().smaller(), rows=16)
    assert found.refused >= 2


@needs_triton
def test_search_takes_noise_for_noise():
    found = tuning.search(
        START, tuning.axes(True, 64, True), lambda config: 1.0 if config == START else 0.99
    )
    assert found.config == START


@needs_triton
def test_search_without_any_configuration():
    with pytest.raises(RuntimeError, match="refuses every configuration"):
        tuning.search(START, [], lambda config: None)


# Measuring


def pretended():
    """A pass without kernels, whose result shows the configuration's rows."""
    config = configs.choose("family", False, 64, torch.bfloat16, False)
    return torch.tensor([1.0 if config.rows > 32 else float("nan"), 2.0]), None


@needs_triton
@pytest.mark.parametrize("best", [1.9, 3.2])
def test_the_last_comparison_decides(best):
    times = iter([3.0, 2.0])

    def clock(rivals, seconds):
        return {"start": 3.1, "best": best} if len(rivals) > 1 else {"": next(times)}

    before = configs.choose
    tuned = tuning.tune(pretended, clock, 0.0, limit=2)
    assert configs.choose is before
    assert tuned.key == "forward-64-bfloat16-short"
    assert (tuned.tried, tuned.refused, tuned.wrong) == (2, 0, 0)
    if best < 3.1:
        assert tuned.config != tuned.start and tuned.times == (3.1, best)
    else:
        assert tuned.config == tuned.start and tuned.times == (3.1, 3.1)


@needs_triton
def test_tuning_passes_over_errors_and_other_results():
    def call():
        config = configs.choose("family", False, 64, torch.bfloat16, False)
        if config.block == 128:
            raise OutOfResources(2, 1, "shared memory")
        if config.forward.stages == 3:
            raise RuntimeError("PassManager::run failed")
        return pretended()

    def clock(rivals, seconds):
        return dict.fromkeys(rivals, 1.0)

    tuned = tuning.tune(call, clock, 0.0)
    assert tuned.config == tuned.start
    assert tuned.refused == 3 and tuned.wrong == 1


@needs_triton
def test_a_candidate_is_not_replaced_by_a_smaller_one(monkeypatch):
    launched = launch.launch

    def refusing(kernel, grid, how, values):
        if values["BLOCK"] == 64 and kernel is launch.forward_kernel:
            raise OutOfResources(2, 1, "shared memory")
        launched(kernel, grid, how, values)

    monkeypatch.setattr(launch, "launch", refusing)
    monkeypatch.setattr(launch, "_SHRUNK", {})
    only = [lambda config: [replace(config, block=64)]]
    monkeypatch.setattr(tuning, "axes", lambda *_: only)
    call = tuning.example(False, 16, torch.float16, 1, 20, 1, DEVICE, LOG)
    tuned = tuning.tune(call, lambda rivals, _: dict.fromkeys(rivals, 1.0), 0.0)
    assert (tuned.tried, tuned.refused) == (2, 1)
    assert launch._SHRUNK == {}


# Profiles


@pytest.fixture
def tuner(monkeypatch):
    """bench.tune on tiny calls, without a GPU and a clock: the last candidate is the fastest."""
    monkeypatch.setattr(bench, "_tunable", lambda _: torch.device(DEVICE))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(bench, "TUNED", {"long": (1, 20)})
    example = tuning.example

    def tiny(backward, head_dim, dtype, batch, length, *_):
        return example(backward, head_dim, dtype, batch, length, 1, DEVICE, LOG)

    monkeypatch.setattr(tuning, "example", tiny)
    times = (1000 * 0.9**n for n in range(100))

    def interleaved(rivals, *_, **__):
        return {name: next(times) for name in rivals}

    monkeypatch.setattr(bench, "interleaved", interleaved)

    def tune(out, **options):
        lines = []
        bench.tune(None, 0.0, candidates=2, out=out, report=lines.append, **options)
        return lines

    return tune


@needs_triton
def test_a_profile_is_used(tuner, tmp_path, monkeypatch):
    out = tmp_path / "runs" / "profile.json"
    forward, backward, *rest = tuner(out, head_dims=[16], dtypes=["fp16"])
    name = "16-float16-long, 1x20: "
    assert forward.startswith(f"forward-{name}810 ms -> 729 ms (1.11x): forward 4 warps ")
    assert backward.startswith(f"backward-{name}531 ms -> 478 ms (1.11x): dq 4 warps ")
    assert all(line.endswith("; 2 tried, 0 refused") for line in (forward, backward))
    assert rest == [f"written: {out}; to use it:", f"export FASTDEBERTA_TRITON_PROFILE={out}"]

    def normal(*shape):
        return torch.randn(*shape, 1, 16, dtype=torch.float16, device=DEVICE).requires_grad_()

    tensors = [normal(1, 20), normal(1, 20), normal(1, 20), normal(16), normal(16)]

    def attend(backend):
        result = disentangled_attention(*tensors, relative_position=LOG, backend=backend)
        return result, *torch.autograd.grad(result.float().sum(), tensors)

    monkeypatch.setenv("FASTDEBERTA_TRITON_PROFILE", str(out))
    taken, choose = [], configs.choose
    monkeypatch.setattr(configs, "choose", lambda *what: taken.append(choose(*what)) or taken[-1])
    for ours, expected in zip(attend("triton"), attend("reference"), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-2, rtol=1e-2)
    assert taken[0].forward.warps == taken[1].dq.warps == 8
    entries = json.loads(out.read_text())["configs"]
    assert taken == [Config.from_dict(values) for values in entries.values()]


@needs_triton
def test_a_profile_is_added_to_on_the_same_device_only(tuner, tmp_path, monkeypatch):
    out = tmp_path / "profile.json"

    def example(backward, head_dim, dtype, *_):
        return lambda: (torch.ones(1) * bool(configs.choose("sm_90", backward, 16, dtype, True)),)

    monkeypatch.setattr(tuning, "example", example)
    tuner(out, head_dims=[16], dtypes=["fp16"])
    tuner(out, head_dims=[16], dtypes=["fp32"])
    profile = json.loads(out.read_text())
    keys = [f"{p}-16-{d}-long" for d in ("float16", "float32") for p in ("forward", "backward")]
    assert list(profile["configs"]) == list(profile["milliseconds"]) == keys
    out.write_text(json.dumps(profile | {"device": "another"}))
    tuner(out, head_dims=[16], dtypes=["fp16"])
    assert list(json.loads(out.read_text())["configs"]) == keys[:2]


@needs_triton
@pytest.mark.parametrize("content", ["", "[]", '{"configs": {}}'])
def test_what_is_no_profile_is_not_overwritten(content, tuner, tmp_path):
    out = tmp_path / "notes.json"
    out.write_text(content)
    with pytest.raises(ValueError, match="notes.json is there and is no profile: "):
        tuner(out)
    assert out.read_text() == content


@needs_triton
@pytest.mark.parametrize(
    "content",
    [None, "", "{}", '{"configs": {"forward-16-float16-long": {"blok": 32}}}'],
    ids=["missing", "empty", "without configs", "unknown field"],
)
def test_a_broken_profile_is_named(content, tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("FASTDEBERTA_TRITON_PROFILE", str(path))
    x = torch.randn(1, 4, 1, 16, dtype=torch.float16, device=DEVICE)
    table = torch.randn(512, 1, 16, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match=r"FASTDEBERTA_TRITON_PROFILE must name .*profile.json is"):
        disentangled_attention(
            x, x, x, table, table, relative_position=RelativePosition(), backend="triton"
        )


@needs_triton
@pytest.mark.parametrize("head_dim", [0, 257])
def test_head_dims_that_do_not_fit(head_dim, tuner, tmp_path):
    with pytest.raises(ValueError, match=f"head-dim must be between 1 and 256, got {head_dim}"):
        tuner(tmp_path / "profile.json", head_dims=[head_dim])
