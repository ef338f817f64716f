"""accelerate() inside other libraries' models and under their wrappers: predictions as before.

Every model is tiny, has random weights and is made here. Which libraries there are depends on the
environment: GLiNER needs transformers < 5.17, GLiClass and sentence-transformers need >= 5.
"""

import copy
import math
import statistics
import time

import pytest
import tiny
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DebertaConfig,
    DebertaV2Config,
    ElectraConfig,
    PreTrainedTokenizerFast,
)

from fastdeberta import accelerate, restore

IS_4 = transformers.__version__.startswith("4.")

TEXTS = [
    "A small oak hides near the old reef, and the grey fox sleeps by the path.",
    "The whale dives.",
    "Big gull drifts near the coast, the young crab swims by the old shell, and the seal walks.",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = sorted({word for text in TEXTS for word in text.replace(",", "").strip(".").split()})

V1 = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
CONFIGS = {
    "deberta": (DebertaConfig, tiny.SIZES | V1 | {"position_biased_input": False}),
    "deberta-v2": (DebertaV2Config, tiny.DEBERTA),
    "electra": (ElectraConfig, tiny.ELECTRA),
}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = SPECIAL + WORDS + [",", "."]
    words += [f"[unused{i}]" for i in range(tiny.SIZES["vocab_size"] - len(words))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **dict(zip(names, SPECIAL, strict=True)))


def config_of(family, **changes):
    kind, settings = CONFIGS[family]
    return kind(**settings | changes)


def backbone(family, tmp_path, auto=AutoModel):
    """A folder with a model and its tokenizer."""
    tiny.randomize(auto.from_config(config_of(family))).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def sentence_transformer(family, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(backbone(family, tmp_path), device="cpu")  # Mean pooling.
    return model, lambda: model.encode(TEXTS, batch_size=3).tolist()


def cross_encoder(family, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    path = backbone(family, tmp_path, AutoModelForSequenceClassification)
    model = library.CrossEncoder(path, device="cpu", max_length=40)
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    return model, lambda: model.predict(pairs, batch_size=4).tolist()


def gliclass(family, tmp_path):
    library = pytest.importorskip("gliclass")
    words = tokenizer()
    words.add_tokens(["<<LABEL>>", "<<SEP>>", "<<EXAMPLE>>"], special_tokens=True)
    config = library.GLiClassModelConfig(
        encoder_config=config_of(family, vocab_size=len(words)).to_dict(),
        encoder_model="none",
        class_token_index=len(words) - 3,
        text_token_index=len(words) - 2,
        example_token_index=len(words) - 1,
        problem_type="multi_label_classification",
    )
    model = tiny.randomize(library.GLiClassModel(config))
    pipeline = library.ZeroShotClassificationPipeline(
        model, words, device="cpu", progress_bar=False
    )
    return model, lambda: pipeline(TEXTS, ["reef", "old fox", "coast"], threshold=0.0)


def gliner(family, tmp_path, span_mode="markerV0"):
    library = pytest.importorskip("gliner")
    config = library.GLiNERConfig(
        model_name=backbone(family, tmp_path),
        hidden_size=32,
        span_mode=span_mode,
        max_width=3,
        max_len=40,
    )
    model = library.GLiNER.from_config(config)
    tiny.randomize(model, std=0.1)  # Probabilities of around a half.
    return model, lambda: model.inference(TEXTS, ["animal", "place"], threshold=0.4)


def gliner_tokens(family, tmp_path):
    return gliner(family, tmp_path, "token_level")


LIBRARIES = [
    (build, family)
    for build, families in {
        sentence_transformer: CONFIGS,
        cross_encoder: CONFIGS,
        gliclass: ["deberta-v2", "electra"],
        gliner: ["deberta-v2", "electra"],
        gliner_tokens: ["deberta-v2"],
    }.items()
    for family in families
]


class Calls(TorchDispatchMode):
    """Counts runs of our op."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() == "fastdeberta::forward"
        return func(*args, **(kwargs or {}))


def calls_of(function):
    with Calls() as calls:
        function()
    return calls.count


def assert_same(got, expected):
    if isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for mine, truth in zip(got, expected, strict=True):
            assert_same(mine, truth)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, truth in expected.items():
            assert_same(got[key], truth)
    elif isinstance(expected, float):
        assert math.isclose(got, expected, rel_tol=1e-3, abs_tol=1e-4)
    else:
        assert got == expected


@pytest.mark.parametrize(
    ("build", "family"), LIBRARIES, ids=[f"{b.__name__}-{f}" for b, f in LIBRARIES]
)
def test_same_predictions(build, family, tmp_path):
    model, predict = build(family, tmp_path)
    expected, keys = predict(), list(model.state_dict())
    assert any(expected) and calls_of(predict) == 0
    assert accelerate(model) is model and list(model.state_dict()) == keys
    assert calls_of(predict) >= 3
    assert_same(predict(), expected)
    assert_same(predict(), expected)
    with torch.no_grad():  # The control: predictions depend on the encoder's weights.
        for name, parameter in model.named_parameters():
            if name.endswith("layer.1.output.dense.weight"):
                parameter.neg_()
    changed = predict()
    with pytest.raises(AssertionError):
        assert_same(changed, expected)
    restore(model)
    assert calls_of(predict) == 0
    assert_same(predict(), changed)


# Wrappers

LENGTHS = torch.tensor([[29], [11], [1]])
INPUTS = {"input_ids": tiny.token_ids(3, 29), "attention_mask": (torch.arange(29) < LENGTHS).long()}
FAMILIES = list(CONFIGS)
TARGETS = {
    "deberta": ["in_proj", "pos_q_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "electra": ["query", "value"],
}


def model_of(family, **changes):
    return tiny.randomize(AutoModel.from_config(config_of(family, **changes)))


def valid(output):
    return output.last_hidden_state[INPUTS["attention_mask"].bool()]


def states_of(model):
    with torch.no_grad():
        return valid(model(**INPUTS))


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def adapted(model, family):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=TARGETS[family], init_lora_weights=False)
    generator = torch.Generator().manual_seed(5)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("order", ["accelerate-adapt", "adapt-accelerate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft(family, order):
    model = model_of(family)
    plain = states_of(model)
    theirs = adapted(copy.deepcopy(model), family)
    if order == "accelerate-adapt":
        ours = adapted(accelerate(model), family)
    else:
        ours = accelerate(adapted(model, family))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    expected = states_of(theirs)
    assert (expected - plain).abs().max() > 0.1
    assert_close(states_of(ours), expected)
    assert calls_of(lambda: ours(input_ids=INPUTS["input_ids"])) == 3
    with ours.disable_adapter():
        assert_close(states_of(ours), plain)

    for adapter in (ours, theirs):
        valid(adapter.train()(**INPUTS)).square().mean().backward()
    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert grads and all("lora" in name for name in grads)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            assert_close(grads[name], parameter.grad)

    merged = copy.deepcopy(ours).eval().merge_and_unload()
    assert_close(states_of(merged), expected)
    assert_close(states_of(restore(merged)), expected)
    restore(ours.eval())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert calls_of(lambda: ours(input_ids=INPUTS["input_ids"])) == 0
    assert_close(states_of(ours), expected)


class Graphs:
    """A compiler that runs the graphs as they are and keeps the names of their operators."""

    def __init__(self):
        self.operators = set()

    def __call__(self, graph, inputs):
        self.operators |= {str(node.target) for node in graph.graph.nodes}
        return graph

    def hold_ours(self):
        return any("fastdeberta" in name for name in self.operators)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_before(family):
    """Compiled after: see test_inference.py."""
    torch.compiler.reset()
    inputs = {"input_ids": INPUTS["input_ids"]}
    model, graphs = model_of(family, num_hidden_layers=1), Graphs()
    compiled = torch.compile(model, backend=graphs)
    with torch.no_grad():
        expected = [copy.deepcopy(model)(**x).last_hidden_state for x in (inputs, INPUTS)]
        assert_close(compiled(**inputs).last_hidden_state, expected[0])
        assert not graphs.hold_ours()
        assert accelerate(compiled) is compiled
        assert_close(compiled(**inputs).last_hidden_state, expected[0])
        mask = INPUTS["attention_mask"].bool()
        assert_close(compiled(**INPUTS).last_hidden_state[mask], expected[1][mask])
    # transformers 4.57 always builds a mask, of which compiled code cannot tell that it hides none.
    assert graphs.hold_ours() or (IS_4 and family == "electra")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_compiled_training(family):
    torch.compiler.reset()
    model = accelerate(model_of(family, num_hidden_layers=1)).train()
    compiled = torch.compile(copy.deepcopy(model))
    for each in (model, compiled):
        valid(each(**INPUTS)).square().mean().backward()
    grads = dict(model.named_parameters())
    for name, parameter in compiled._orig_mod.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad, grads[name].grad)


def replica_of(module):
    """As DataParallel copies a module to another device: parameters replaced, all else shared."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        replica._modules[name] = replica_of(child)
        setattr(replica, name, replica._modules[name])
    for name, parameter in module._parameters.items():
        replica._parameters[name] = None
        if parameter is not None:
            delattr(replica, name)
            setattr(replica, name, torch.zeros_like(parameter))
    return replica


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_replicas_of_data_parallel_have_their_own_weights(family, inference):
    model = accelerate(model_of(family), inference=inference)
    expected = states_of(model)
    assert not states_of(replica_of(model)).any()
    assert_close(states_of(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family):
    theirs = model_of(family)
    ours = accelerate(copy.deepcopy(theirs))
    truth = states_of(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        got = states_of(ours)
        if family != "deberta":  # Whose masked_fill overflows in transformers.
            assert got.dtype == states_of(theirs).dtype
        assert calls_of(lambda: ours(input_ids=INPUTS["input_ids"])) == 3
        valid(ours.train()(**INPUTS)).square().mean().backward()
    assert ours.encoder.layer[0].output.dense.weight.grad.any()
    error, allowed = ((x - truth).abs().mean() for x in (got, states_of(theirs.bfloat16())))
    assert 0 < error < 2 * allowed


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes(family, dtype):
    theirs = model_of(family)
    ours = accelerate(copy.deepcopy(theirs))
    truth = states_of(copy.deepcopy(theirs).double())
    got, expected = (states_of(model.to(dtype)) for model in (ours, theirs))
    assert got.dtype == dtype
    error, allowed = ((x - truth).abs().mean() for x in (got, expected))
    assert error < 2 * allowed + 1e-6  # transformers' softmax scale is float32's in float64 too.


@pytest.mark.parametrize("family", FAMILIES)
def test_resized_embeddings(family):
    ours = accelerate(model_of(family))
    expected = states_of(ours)
    ours.resize_token_embeddings(80, mean_resizing=False)
    assert_close(states_of(ours), expected)
    assert ours(input_ids=torch.full((1, 5), 79)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_stay(family):
    model, seen = model_of(family), []
    attention = model.encoder.layer[1].attention.self
    handle = attention.register_forward_hook(lambda *_: seen.append("forward"))
    attention.register_full_backward_hook(lambda *_: seen.append("backward"))
    accelerate(model)(**INPUTS).last_hidden_state.sum().backward()
    assert seen == ["forward", "backward"]
    handle.remove()
    model(**INPUTS)
    restore(model)(**INPUTS)
    assert seen == ["forward", "backward"]


def test_foreign_attention_in_an_encoder_keeps_its_positions():
    """As GLiClass's and FlashDeBERTa's classes, which are not to be touched."""
    model = model_of("deberta-v2")
    attention = model.encoder.layer[1].attention.self
    attention.__class__ = type("OtherAttention", (type(attention),), {})
    expected = states_of(model)
    accelerate(model)
    assert type(model.encoder.layer[1].attention.self).__name__ == "OtherAttention"
    assert calls_of(lambda: states_of(model)) == 2
    assert_close(states_of(model), expected)
    assert_close(states_of(restore(model)), expected)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: nn.ModuleList([model])])
def test_wrapped(wrap):
    model = model_of("deberta-v2")
    expected = states_of(model)
    accelerate(wrap(model))
    assert_close(states_of(model), expected)
    assert calls_of(lambda: states_of(model)) == 3


# Speed

LARGE = {
    "vocab_size": 1000,
    "hidden_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "max_relative_positions": 512,
    "position_buckets": 256,
}


def medians(functions, rounds=9):
    """Seconds of each, taken in turns."""
    times = [[] for _ in functions]
    for _ in range(rounds + 2):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[2:]) for taken in times]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_faster_at_one_times_512(family):
    changes = dict(LARGE)
    if family != "deberta-v2":
        changes.pop("position_buckets")
    if family == "electra":
        changes.pop("max_relative_positions")
        changes["embedding_size"] = 768
    kind, settings = CONFIGS[family]
    theirs = AutoModel.from_config(kind(**settings | changes)).eval()
    ours = accelerate(copy.deepcopy(theirs))
    inputs = {"input_ids": tiny.token_ids(1, 512, vocab=1000)}
    inputs["attention_mask"] = torch.ones(1, 512, dtype=torch.long)
    with torch.no_grad():
        before, after = medians([lambda: theirs(**inputs), lambda: ours(**inputs)])
    print(f"{family}: {before * 1e3:.0f} ms, accelerated {after * 1e3:.0f} ms")
    assert after < before
