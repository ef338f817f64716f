"""Models compiled, traced and exported: one graph for every shape, and the same outputs."""

import json
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch

from fastdeberta import cli, export
from fastdeberta import tokenizer as tokenizers
from fastdeberta.attention import DisentangledAttention
from fastdeberta.models import Model
from fastdeberta.models.heads import HEADS

# Family, head and changes of the config; a new head or kind of layer is one more line.
MODELS = {
    **{f"v3-{head}": ("deberta-v2", head, {}) for head in HEADS},
    "v3-linear": ("deberta-v2", "base", {"position_buckets": -1}),
    "v2-conv": ("deberta-v2", "token", {"conv_kernel_size": 3}),
    "v3-emd": ("deberta-v2", "mlm", {"emd": True}),
    "v3-beam": ("deberta-v2", "span", {"span_head": "beam", "span_beam_size": 4}),
    "v1-sequence": ("deberta", "sequence", {}),
    "v1-talking": ("deberta", "token", {"talking_head": True}),
    "electra-rtd": ("electra", "rtd", {}),
    "electra-beam": ("electra", "span", {"span_head": "beam", "span_beam_size": 4}),
    "electra-choice": ("electra", "choice", {"summary_last_dropout": 0.0}),
}
# Those of the fast tests; the others differ in the head alone.
QUICK = ("v2-conv", "v3-emd", "v1-sequence")
SHAPES = ((5, 7), (3, 30), (2, 41))


def each(*quick, among=MODELS):
    """Every model of `among`, marked slow, and `quick`."""
    slow = [pytest.param(n, marks=pytest.mark.slow) for n in among if n not in quick]
    return [*quick, *slow]


def make(name, **changes):
    family, head, given = MODELS[name]
    config = tiny.config(family, **{"num_hidden_layers": 2, **given, **changes})
    return tiny.randomize(Model(config, head))


def inputs_of(model, batch, length, *, mask=True, labels=False, left=False):
    inputs = export.sample(model, batch, length, left)
    ids = inputs["input_ids"]
    if not mask:
        del inputs["attention_mask"]
    if not labels or model.head is None:
        return inputs
    if model.head_name == "span":
        inputs["start_positions"] = torch.ones(batch, dtype=torch.long)
        inputs["end_positions"] = torch.full((batch,), 2)
    elif model.head_name == "entity":
        inputs["labels"] = torch.ones(batch, 2)
    elif model.head_name in ("sequence", "choice"):
        inputs["labels"] = torch.ones(batch, dtype=torch.long)
    else:
        labels = ids % 2 if model.head_name in ("rtd", "token") else ids
        inputs["labels"] = labels.where(inputs.get("attention_mask", torch.ones(1)).bool(), -100)
    return inputs


def assert_same(got, expected, mask=None, tolerance=1e-4):
    """Every tensor of two outputs, of padding only that it is there."""
    assert got.keys() == expected.keys()
    mask = None if mask is None else mask.flatten(0, -2)
    for name, theirs in expected.items():
        ours = got[name]
        assert ours.shape == theirs.shape, name
        if mask is not None and ours.shape[: mask.dim()] == mask.shape:
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


def tensors(output):
    return dict(export._tensors(output))


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def compiler(model, backend="aot_eager"):
        return torch.compile(model, fullgraph=True, dynamic=True, backend=backend)

    yield compiler
    torch._dynamo.reset()


# torch.compile


def check_compiled(compiled, model, mask, training):
    model.train(training)
    for batch, length in SHAPES:
        inputs = inputs_of(model, batch, length, mask=mask, labels=training)
        with torch.set_grad_enabled(training):
            got, expected = compiled(**inputs), model(**inputs)
        kept = inputs.get("attention_mask")
        assert_same(tensors(got), tensors(expected), kept)
        if not training:
            continue
        results = []
        for output in (got, expected):
            model.zero_grad()
            loss = output.loss
            if loss is None:
                state = output.last_hidden_state
                loss = (state if kept is None else state[kept.bool()]).square().mean()
            loss.backward()
            results.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        assert_same(*results)
    assert graphs() == 1


@pytest.mark.parametrize("name", each(*QUICK))
def test_compile_training(name, compiler):
    model = make(name)
    check_compiled(compiler(model), model, mask=True, training=True)


# Evaluation differs from training where a head does.
@pytest.mark.parametrize("name", each("v3-sequence", among=("v3-beam", "v2-conv", "electra-rtd")))
def test_compile_evaluation(name, compiler):
    model = make(name)
    check_compiled(compiler(model), model, mask=True, training=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, "electra-rtd"])
def test_compile_training_without_padding(name, compiler):
    model = make(name)
    check_compiled(compiler(model), model, mask=False, training=True)


@pytest.mark.parametrize("name", each("electra-rtd", among=(*QUICK, "v3-beam", "v3-causal")))
def test_compile_packed(name, compiler):
    model = make(name)
    compiled = compiler(model)
    for lengths in ((3, 9), (20, 1, 5), (41, 7, 7, 2)):
        ids = tiny.token_ids(sum(lengths))
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        inputs = {"input_ids": ids, "cu_seqlens": starts, "max_seqlen": max(lengths)}
        with torch.no_grad():
            assert_same(tensors(compiled(**inputs)), tensors(model(**inputs)))
    assert graphs() == 1


@pytest.mark.parametrize(
    "name", ["v3-sequence", pytest.param("v1-talking", marks=pytest.mark.slow)]
)
def test_compile_with_dropout(name, compiler):
    model = make(name, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2).train()
    compiled, losses = compiler(model), set()
    for batch, length in (SHAPES[0], *SHAPES):
        output = compiled(**inputs_of(model, batch, length, labels=True))
        output.loss.backward()
        losses.add(output.loss.item())
    assert graphs() == 1 and len(losses) == 1 + len(SHAPES)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
def test_compile_with_inductor(compiler):
    model = make("v3-sequence")
    check_compiled(compiler(model, "inductor"), model, mask=True, training=True)


# torch.export


@pytest.mark.parametrize("name", each(*QUICK))
def test_program(name):
    model = make(name)
    program = export.program(model)
    fused = [n for n in program.graph.nodes if str(n.target).startswith("fastdeberta.forward")]
    passes = model.config.num_hidden_layers + bool(model.config.emd) * (model.config.emd_passes - 1)
    assert len(fused) == (0 if model.config.talking_head else passes)
    for batch, length in SHAPES:
        for left in (False, True):
            inputs = export.sample(model, batch, length, left)
            with torch.no_grad():
                expected = export.Graph(model)(**inputs)
            got = program.module()(**inputs)
            assert_same(got, expected, inputs["attention_mask"])


def test_export_by_hand():
    """torch.export of a model itself gives its own output class."""
    model = make("v3-span")
    inputs = {"input_ids": tiny.token_ids(3, 9)}
    length = torch.export.Dim("length", max=export.LONGEST)
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: length}}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    ids = tiny.token_ids(2, 41)
    with torch.no_grad():
        expected = model(ids)
    assert_same(tensors(program.module()(input_ids=ids)), tensors(expected))


def test_a_composed_program_holds_no_custom_operator():
    model = make("v3-sequence")
    with export.composed(model):
        program = export.program(model)
    assert "fastdeberta" not in str(program.graph) and "log" not in str(program.graph)


def test_composed_is_restored():
    model = make("v1-sequence")
    layers = [m for m in model.modules() if isinstance(m, DisentangledAttention)]
    layers[1].compose()
    with pytest.raises(KeyError), export.composed(model):
        assert all(layer.composed for layer in layers)
        raise KeyError
    assert [layer.composed for layer in layers] == [False, True]


@pytest.mark.parametrize("name", ["v3-sequence", "v3-linear", "v1-sequence"])
def test_composed_rows_are_those_of_the_rule(name):
    attention = make(name).backbone.encoder.layer[0].attention.self
    rule = attention.relative_position
    attention.compose()
    reach = 2 * max(rule.max_distance, rule.span) + 3
    assert attention._row_table is not None
    rows, _ = attention._rows(rule, reach, reach, torch.device("cpu"))
    position = torch.arange(reach)
    distance = position[:, None] - position[None, :]
    assert torch.equal(rows[0, 0], rule.row(distance))
    assert not torch.equal(rows[0, 0], rule.row(distance + 1))


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="model must be in eval mode"):
        export.program(make("v3-sequence").train())


# ONNX


@cache
def onnx_file(name, directory):
    onnx_packages()
    path = directory / f"{name}.onnx"
    difference = export.export_onnx(make(name), path)
    assert 0 < difference < 1e-4
    return path


def onnx_packages():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.mark.parametrize("name", each("v3-sequence", "electra-rtd"))
def test_onnx(name, directory):
    """Shapes that were not traced, also longer than the positions reach."""
    path = onnx_file(name, directory)
    import onnx
    import onnxruntime

    graph = onnx.load(path)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 18)]
    assert not graph.functions and {n.domain for n in graph.graph.node} == {""}
    assert "Log" not in {n.op_type for n in graph.graph.node} or MODELS[name][1] == "span"
    first = graph.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in first][:: len(first) - 1] == ["batch", "length"]

    model, session = make(name), onnxruntime.InferenceSession(path)
    for batch, length in ((1, 5), *SHAPES, (1, 48)):
        for left in (False, True):
            inputs = export.sample(model, batch, length, left)
            names = [o.name for o in session.get_outputs()]
            got = session.run(names, {k: x.numpy() for k, x in inputs.items()})
            got = dict(zip(names, map(torch.from_numpy, got), strict=True))
            with torch.no_grad():
                expected = export.Graph(model)(**inputs)
            assert_same(got, expected, inputs["attention_mask"])


def test_onnx_of_another_model_is_told(directory):
    path = onnx_file("v3-sequence", directory)
    with pytest.raises(RuntimeError, match="onnxruntime's outputs differ from the model's by"):
        export._onnx_difference(make("v3-sequence", position_buckets=6), path)


@pytest.mark.parametrize("opset", [17, 1000])
def test_onnx_opset(opset, tmp_path):
    onnx_packages()
    with pytest.raises(ValueError, match=f"opset must be 18 to .* got {opset}"):
        export.export_onnx(make("v3-sequence"), tmp_path / "model.onnx", opset)


def test_onnx_of_another_dtype(tmp_path):
    onnx_packages()
    with pytest.raises(ValueError, match="model must be float32 on the CPU, got torch.float64"):
        export.export_onnx(make("v3-sequence").double(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_text("old")

    def write(place):
        (place / "model.onnx").write_text("new")
        (place / "model.onnx.data").write_text("weights")
        if fails:
            raise RuntimeError

    fails = True
    with pytest.raises(RuntimeError):
        export._publish(tmp_path, write, "model.onnx")
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"
    fails = False
    export._publish(tmp_path, write, "model.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx").read_text() == "new"


# The command


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A directory in transformers' layout, with a tokenizer, beside nothing else."""
    monkeypatch.chdir(tmp_path)
    size = tiny.tokenizer().get_vocab_size()
    model = make("v3-sequence", num_hidden_layers=1, vocab_size=size)
    model.save_pretrained("model")
    tokenizers.save(tiny.tokenizer(), "model")
    return model


def run(capsys, *arguments):
    """Exit status, lines of standard output, and standard error."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", "--model", "model", *arguments])
    captured = capsys.readouterr()
    return caught.value.code, captured.out.splitlines(), captured.err


COMPANIONS = {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_command_onnx(checkpoint, capsys, monkeypatch):
    """With weights in a second file, as those of large models are."""
    onnx_packages()
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    Path("out").mkdir()
    Path("out/kept.txt").write_text("kept")
    status, lines, err = run(capsys, "--format", "onnx", "--out", "out")
    assert (status, err) == (0, "")
    assert lines[0] == "head: sequence" and lines[-1] == "written: out/model.onnx"
    assert lines[1].startswith("largest difference in onnxruntime: ")
    names = {f.name for f in Path("out").iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "kept.txt", *COMPANIONS}
    config = json.loads(Path("out/config.json").read_text())
    assert config["architectures"] == ["DebertaV2ForSequenceClassification"]


def test_command_torch(checkpoint, capsys):
    status, lines, err = run(capsys, "--format", "torch", "--out", "here/it.pt2", "--head", "base")
    assert (status, lines, err) == (0, ["head: base", "written: here/it.pt2"], "")
    assert [f.name for f in Path("here").iterdir()] == ["it.pt2"]
    inputs = export.sample(checkpoint, 2, 33)
    got = torch.export.load("here/it.pt2").module()(**inputs)
    with torch.no_grad():
        expected = {"last_hidden_state": checkpoint(**inputs).last_hidden_state}
    assert_same(got, expected, inputs["attention_mask"])


def test_command_transformers(checkpoint, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    status, lines, err = run(capsys, "--format", "transformers")
    where = "runs/export-transformers"
    assert (status, lines, err) == (0, ["head: sequence", f"written: {where}"], "")
    assert {f.name for f in Path(where).iterdir()} == {"model.safetensors", *COMPANIONS}
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(where).eval()
    text = transformers.AutoTokenizer.from_pretrained(where)("the old oak", return_tensors="pt")
    inputs = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
    with torch.no_grad():
        torch.testing.assert_close(checkpoint(**inputs).logits, theirs(**inputs).logits)


def test_command_without_a_named_head(checkpoint, capsys):
    values = json.loads(Path("model/config.json").read_text())
    del values["architectures"]
    Path("model/config.json").write_text(json.dumps(values))
    status, lines, _ = run(capsys, "--format", "transformers")
    assert status == 0
    assert lines[0] == "head: base (config.json names no known architecture: --head chooses)"


BAD = {
    "format": (("--format", "tflite"), "format must be one of onnx, torch, transformers; got 'tfl"),
    "head": (("--format", "torch", "--head", "tail"), "head must be one of base, mlm, "),
    "head without weights": (("--format", "torch", "--head", "mlm"), "model"),
    "no model": (("--format", "torch", "--model", "./missing"), "no model directory at missing"),
    "out": (("--format", "torch", "--out", "model/config.json"), "out must be a directory or a fi"),
    "opset": (("--format", "onnx", "--opset", "9"), "opset must be 18 to "),
}


@pytest.mark.parametrize("case", BAD)
def test_command_with_bad_input(case, checkpoint, capsys):
    arguments, message = BAD[case]
    if case == "opset":
        onnx_packages()
    status, lines, err = run(capsys, *arguments)
    assert (status, lines) == (2, [])
    assert err.startswith(f"fastdeberta: {message}") and err.count("\n") == 1
    assert not Path("runs").exists()


def test_command_without_onnx(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    status, lines, err = run(capsys, "--format", "onnx")
    assert (status, lines) == (1, []) and err.count("\n") == 1
    assert "ONNX needs onnx and onnxscript: pip install 'fastdeberta[onnx]'" in err
