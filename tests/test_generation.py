"""Causal language models: what they may see, their loss, and the text they generate."""

import math
from collections import Counter

import pytest
import tiny
import torch
import transformers
from closeness import assert_close
from torch import nn

from fastdeberta import available_backends
from fastdeberta.attention import set_backend
from fastdeberta.cache import KeyValueCache
from fastdeberta.models import Model, from_pretrained
from fastdeberta.models.generation import CachedReader, Rereader, sample

# Prompt and new tokens go past every distance's saturation (16), and fill 48 absolute positions.
LENGTHS, LONG, NEW = [9, 3, 18, 1], 18, 30

CASES = {
    "v1": ("deberta", {}),
    "v1-c2p": ("deberta", {"pos_att_type": ["c2p"]}),
    "v1-p2c": ("deberta", {"pos_att_type": ["p2c"]}),
    "v1-talking-heads": ("deberta", {"talking_head": True}),
    "v1-positions": ("deberta", {"position_biased_input": True, "type_vocab_size": 2}),
    "v3": ("deberta-v2", {}),
    "v2-linear": ("deberta-v2", {"position_buckets": -1}),
    "v2-own-projections": ("deberta-v2", {"share_att_key": False}),
    "v2-c2p": ("deberta-v2", {"pos_att_type": ["c2p"]}),
    "v2-p2c": ("deberta-v2", {"pos_att_type": ["p2c"], "share_att_key": False}),
    "v2-narrow-embedding": ("deberta-v2", {"embedding_size": 20}),
    "v2-c2c": ("deberta-v2", {"relative_attention": False, "position_biased_input": True}),
    "electra": ("electra", {}),
}
FEW = ["v1", "v1-talking-heads", "v3", "electra"]


def causal(case, dtype=torch.float64, **changes):
    """A model that writes many different tokens."""
    family, more = CASES[case]
    model = tiny.randomize(Model(tiny.config(family, **more | changes), "causal"))
    with torch.no_grad():  # Nothing prefers some tokens everywhere.
        table = model.backbone.embeddings.word_embeddings.weight
        table.copy_(2 * nn.functional.normalize(table, dim=-1))
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "proj" not in name:
                parameter.zero_()
    return model.to(dtype)


def prompts(side="left"):
    """Ragged prompts, ids and mask [4, 18]; "holes" has padding between the tokens too."""
    index = torch.arange(LONG)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = index >= LONG - lengths if side == "left" else index < lengths
    if side == "holes":
        shuffled = torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)).argsort(1)
        mask = mask.gather(1, shuffled)
    return tiny.token_ids(len(LENGTHS), LONG) * mask, mask


def rows_of(ids, mask):
    return [row[keep] for row, keep in zip(ids, mask.bool(), strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_cached_steps_equal_full_passes(case):
    model = causal(case)
    ids, mask = prompts()
    following = tiny.token_ids(NEW, len(LENGTHS)).t()
    with torch.no_grad():
        reader = CachedReader(model, mask, ids.shape, LONG + NEW)
        cached = [reader(part) for part in (ids, *following.split(1, 1))]
        # Every row on its own, unpadded, in one pass: its last NEW + 1 tokens' logits.
        full = [
            model(torch.cat([row, more])[None]).logits[0, -NEW - 1 :]
            for row, more in zip(rows_of(ids, mask), following, strict=True)
        ]
    ours, truth = {"logits": torch.stack(cached, 1)}, {"logits": torch.stack(full)}
    assert_close(ours, truth, truth, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FEW)
def test_precision_of_cached_steps(case, dtype):
    model = causal(case, dtype)
    ids = tiny.token_ids(2, LONG + NEW)
    with torch.no_grad():
        parts = [ids[:, :LONG], *ids[:, LONG:].split(1, 1)]
        cached, full = (
            torch.stack([reader(part) for part in parts], 1)
            for reader in (CachedReader(model, None, (2, LONG), LONG + NEW), Rereader(model, None))
        )
        truth = model.double()(ids).logits[:, LONG - 1 :]
    assert_close({"logits": cached}, {"logits": full}, {"logits": truth}, dtype)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("case", FEW)
def test_a_batch_generates_what_each_row_does(case, side):
    model = causal(case)
    ids, mask = prompts(side)
    out = model.generate(ids, mask, max_new_tokens=NEW)
    assert out.shape == (len(LENGTHS), LONG + NEW) and torch.equal(out[:, :LONG], ids)
    assert torch.equal(out, model.generate(ids, mask.long(), max_new_tokens=NEW, use_cache=False))
    for row, new in zip(rows_of(ids, mask), out[:, LONG:], strict=True):
        alone = model.generate(row[None], max_new_tokens=NEW)
        assert torch.equal(alone[0, len(row) :], new)
    assert len(out[:, LONG:].unique()) > 4  # The weights make text that differs.


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("case", FEW)
def test_greedy_takes_the_likeliest(case, use_cache):
    model = causal(case)
    ids = tiny.token_ids(2, 5)
    out = model.generate(ids, max_new_tokens=12, use_cache=use_cache)
    with torch.no_grad():
        assert torch.equal(out[:, 5:], model(out).logits[:, 4:-1].argmax(-1))


def test_electra_is_transformers(tmp_path):
    config = transformers.ElectraConfig(**tiny.ELECTRA, is_decoder=True)
    theirs = tiny.randomize(transformers.ElectraForCausalLM(config)).double()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, "causal").double().eval()
    ids, mask = prompts()
    stop = ours.generate(ids, mask, max_new_tokens=NEW)[:2, -20].tolist()
    expected = theirs.generate(
        ids,
        attention_mask=mask.long(),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    out = ours.generate(ids, mask, max_new_tokens=NEW, eos_token_id=stop)
    assert torch.equal(out, expected.sequences)
    new = out[:, LONG:]
    assert (new == 0).any() and (new != 0).any(0).all()
    reader = CachedReader(ours, mask, ids.shape, LONG + NEW)
    with torch.no_grad():
        logits = torch.stack([reader(part) for part in (ids, *new[:, :-1].split(1, 1))], 1)
    # Rows that have ended go on reading padding there too. transformers gives logits in float32.
    truth = {"logits": logits}
    assert_close({"logits": torch.stack(expected.logits, 1)}, truth, truth, torch.float32)


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", FEW)
def test_no_token_sees_a_later_one(case, backend, composed):
    if reason := available_backends()[backend]:
        pytest.skip(f"{backend}: {reason}")
    model = causal(case, torch.float32)
    set_backend(model, backend)
    ids = tiny.token_ids(1, 41)
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % tiny.SIZES["vocab_size"]
    with torch.no_grad():
        for is_causal in (True, False):
            before, after = (
                model(x, causal=is_causal, output_attentions=composed) for x in (ids, changed)
            )
            same = torch.equal(before.logits[:, :20], after.logits[:, :20])
            assert same == is_causal
            assert not torch.equal(before.logits[:, 20:], after.logits[:, 20:])
            if composed and case != "v1-talking-heads":  # These mix probabilities with negatives.
                later = torch.stack(before.attentions).triu(1)
                assert (later == 0).all() == is_causal


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", ["v1", "v1-c2p", "v3", "v2-own-projections", "electra"])
def test_fused_is_composed(case, backend):
    if reason := available_backends()[backend]:
        pytest.skip(f"{backend}: {reason}")
    ids, mask = prompts("right")
    results = {}
    for dtype in (torch.float32, torch.float64):
        model = causal(case, dtype)
        set_backend(model, backend if dtype == torch.float32 else "reference")
        for composed in (False, True):
            output = model(ids, mask, output_attentions=composed)
            output.logits[mask].square().mean().backward()
            values = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            results[dtype, composed] = values | {"logits": output.logits[mask].detach()}
            model.zero_grad()
    truth = results[torch.float64, True]
    assert_close(results[torch.float32, False], results[torch.float32, True], truth, torch.float32)
    assert_close(results[torch.float64, False], truth, truth, torch.float64)


@pytest.mark.parametrize("case", ["v3", "electra"])
def test_loss_and_perplexity(case):
    model = causal(case)
    ids, mask = prompts("right")
    labels = ids.masked_fill(~mask, -100)
    labels[0, 4:6] = -100
    with torch.no_grad():
        padded = model(ids, mask, labels=labels)
        losses = []
        for row, target in zip(rows_of(ids, mask), rows_of(labels, mask), strict=True):
            logp = model(row[None]).logits[0].log_softmax(-1)
            losses += [-logp[t - 1, target[t]] for t in range(1, len(row)) if target[t] != -100]
        mean = torch.stack(losses).mean()
        lengths = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        packed = model(ids[mask], labels=labels[mask], cu_seqlens=lengths, max_seqlen=LONG)
        late = model(ids, mask, labels=labels.roll(1, 1)).loss
    assert len(losses) == sum(LENGTHS) - len(LENGTHS) - 2
    # The loss is computed in float32.
    for loss in (padded.loss, packed.loss):
        assert math.isclose(loss.item(), mean.item(), rel_tol=1e-6)
        perplexity = torch.stack(losses).neg().exp().prod().pow(-1 / len(losses))
        assert math.isclose(loss.exp().item(), perplexity.item(), rel_tol=1e-5)
    assert not math.isclose(late.item(), mean.item(), rel_tol=1e-2)


def brute_force(logits, temperature, top_k, top_p):
    """Token -> probability: the definitions, one token after the other."""
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    likeliest = sorted(weights, key=weights.get, reverse=True)[: top_k or None]
    total = sum(weights[i] for i in likeliest)
    nucleus, mass = [], 0.0
    for i in likeliest:
        if mass < top_p:
            nucleus.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in nucleus)
    return {i: weights[i] / total for i in nucleus}


def agrees(drawn, expected):
    """Whether counts fit a distribution: its support, and every count within 5 deviations."""
    count = sum(drawn.values())
    return set(drawn) <= set(expected) and all(
        abs(drawn[i] - count * p) <= 5 * math.sqrt(count * p * (1 - p)) + 1e-9
        for i, p in expected.items()
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 99},
        {"top_p": 0.01},
        {"top_p": 0.6},
        {"top_p": 0.95},
        {"temperature": 2.0, "top_p": 0.7},
        {"top_k": 5, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.9},
    ],
    ids=str,
)
def test_samples_follow_their_distribution(settings):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 1.5
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    expected = brute_force(logits.tolist(), **plain | settings)
    generator = torch.Generator().manual_seed(6)
    drawn = Counter(sample(logits.expand(20_000, -1), **settings, generator=generator).tolist())
    assert agrees(drawn, expected)
    assert len(drawn) == len(expected)
    # The test tells these settings from slightly different ones.
    other = plain | settings
    other["temperature"] *= 1.15
    if len(expected) > 1:
        assert not agrees(drawn, brute_force(logits.tolist(), **other))


def test_each_row_has_its_own_distribution():
    logits = torch.full((3, 9), -50.0)
    logits[0, 2] = logits[1, 7] = logits[2, 0] = 50.0
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}):
        assert sample(logits, **settings).tolist() == [2, 7, 0]


def test_sampling_is_the_generators():
    model = causal("v3")
    ids, mask = prompts()

    def draw(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        settings = {"do_sample": True, "generator": generator, **settings}
        return model.generate(ids, mask, max_new_tokens=NEW, **settings)

    first = draw(1, temperature=0.8, top_k=20, top_p=0.9)
    torch.manual_seed(99)
    assert torch.equal(first, draw(1, temperature=0.8, top_k=20, top_p=0.9))
    assert torch.equal(first, draw(1, temperature=0.8, top_k=20, top_p=0.9, use_cache=False))
    assert not torch.equal(first, draw(2, temperature=0.8, top_k=20, top_p=0.9))
    greedy = model.generate(ids, mask, max_new_tokens=NEW)
    assert not torch.equal(first, greedy)
    for coldest in (0, 0.0, 1e-300, 1e-4):
        assert torch.equal(greedy, draw(3, temperature=coldest))
    assert torch.equal(greedy, draw(4, top_k=1))
    assert torch.equal(greedy, draw(5, top_p=1e-6))


def test_stop_tokens():
    model = causal("v3")
    ids, mask = prompts("right")
    free = model.generate(ids, mask, max_new_tokens=NEW)[:, LONG:]
    # A token that some rows come to, and not as their first.
    stop = next(t for t in free[0, 1:].tolist() if t != free[0, 0] and not (free == t).any(1).all())
    new = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=1)[:, LONG:]
    assert new.shape == free.shape
    for row, expected in zip(new.tolist(), free.tolist(), strict=True):
        if stop in expected:
            end = expected.index(stop) + 1
            expected = expected[:end] + [1] * (NEW - end)
        assert row == expected
    assert (new == stop).any() and not (new == stop).any(1).all()

    # All rows stop: no step more than the longest needs.
    stops = free[:, 3].tolist()
    ends = [next(n for n, t in enumerate(row.tolist()) if t in stops) for row in free]
    short = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=stops)[:, LONG:]
    assert short.size(1) == max(ends) + 1
    for row, end, expected in zip(short, ends, free, strict=True):
        assert torch.equal(row[: end + 1], expected[: end + 1])
        assert (row[end + 1 :] == model.config.pad_token_id).all()


def test_a_step_costs_one_token():
    model = causal("v2-own-projections")
    seen = {}

    def record(name):
        return lambda module, args, output: seen.setdefault(name, []).append(args[0].size(-2))

    attention = model.backbone.encoder.layer[1].attention.self
    for name in ("query_proj", "key_proj", "pos_key_proj", "pos_query_proj"):
        getattr(attention, name).register_forward_hook(record(name))
    model.head.register_forward_hook(record("head"))
    model.generate(tiny.token_ids(1, 7), max_new_tokens=5)
    rows = 2 * attention.relative_position.span
    assert seen == {
        "query_proj": [7, 1, 1, 1, 1],
        "key_proj": [7, 1, 1, 1, 1],
        "pos_key_proj": [rows],
        "pos_query_proj": [rows],
        "head": [1] * 5,
    }


def test_the_cache_takes_its_memory_once():
    cache = KeyValueCache(batch=2, capacity=5, prompt=3)
    x = torch.randn(2, 5, 2, 4)
    cache.fill(x[:, :3], -x[:, :3], None, None)
    key, value = cache.append(x[:, 3:4], -x[:, 3:4])
    start = key.data_ptr()
    key, value = cache.append(x[:, 4:], -x[:, 4:])
    assert key.data_ptr() == start and cache.length == 5
    assert torch.equal(key, x) and torch.equal(value, -x)
    with pytest.raises(ValueError, match="cache takes one token at a time, 5 in all; got 1 after"):
        cache.append(x[:, :1], x[:, :1])


def test_modes_are_left_as_they_were():
    model = causal("v3", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    ids = tiny.token_ids(2, 6)
    expected = model.generate(ids, max_new_tokens=9)
    model.train()
    model.backbone.embeddings.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    out = model.generate(ids, max_new_tokens=9)
    assert torch.equal(out, expected)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError), torch.no_grad():
        model.head.dense = nn.Linear(3, 3)
        model.generate(ids, max_new_tokens=9)
    assert [module.training for module in model.modules()] == modes


def test_generated_text_can_be_trained_on():
    model = causal("v3", torch.float32).train()
    out = model.generate(tiny.token_ids(2, 6), max_new_tokens=9)
    model(out, labels=out).loss.backward()
    assert model.backbone.embeddings.word_embeddings.weight.grad.any()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_learned_sentence_is_continued(family):
    torch.manual_seed(0)
    model = Model(tiny.config(family), "causal")
    sentence = torch.randperm(60)[:24][None] + 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(sentence, labels=sentence).loss.backward()
        optimizer.step()
    out = model.generate(sentence[:, :3], max_new_tokens=21)
    assert torch.equal(out, sentence)


IDS = tiny.token_ids(2, 6)
FAULTS = {
    "head": ({"head": "mlm"}, "head must be 'causal' to generate text, got 'mlm'"),
    "conv": ({"changes": {"conv_kernel_size": 3}}, "conv_kernel_size must be 0"),
    "shape": ({"input_ids": IDS[0]}, r"input_ids must be \[B, L\] and not empty, got \[6\]"),
    "empty": ({"input_ids": IDS[:, :0]}, r"input_ids must be .* got \[2, 0\]"),
    "vocabulary": ({"input_ids": IDS + 67}, r"input_ids must be in \[0, vocab_size = 67\)"),
    "dtype": ({"input_ids": IDS.float()}, "input_ids must be int64, got torch.float32"),
    "mask": ({"attention_mask": IDS[:, :5]}, "attention_mask must have input_ids' shape"),
    "no-token": ({"attention_mask": IDS * torch.tensor([[1], [0]])}, "got none in row 1"),
    "max_new_tokens": ({"max_new_tokens": 0}, "max_new_tokens must be .* at least 1, got 0"),
    "temperature": ({"temperature": -1.0}, "temperature must be .* at least 0, got -1.0"),
    "infinite": ({"temperature": math.inf}, "temperature must be a finite number"),
    "top_k": ({"top_k": -1}, "top_k must be an integer of at least 0, got -1"),
    "float-top_k": ({"top_k": 2.5}, "top_k must be an integer of at least 0, got 2.5"),
    "top_p": ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    "without-sampling": ({"do_sample": False, "top_p": 0.9}, "top_p needs do_sample=True"),
    "cool-greedy": ({"do_sample": False, "temperature": 0.9}, "temperature needs do_sample=True"),
    "stop": ({"eos_token_id": [3, 67]}, "eos_token_id must hold ids in .* got .3, 67."),
    "float-stop": ({"eos_token_id": 1.5}, "eos_token_id must hold ids in .* got .1.5."),
    "pad": ({"pad_token_id": -1}, "pad_token_id must hold ids in .* got .-1."),
    "generator": ({"generator": 7}, "generator must be a torch.Generator, got int"),
    "electra": (
        {"changes": {"model_type": "electra"}, "max_new_tokens": 43},
        "prompt and new tokens together may be max_position_embeddings = 48, got 6 and 43",
    ),
}


@pytest.mark.parametrize(("call", "message"), FAULTS.values(), ids=FAULTS)
def test_errors(call, message):
    call = {"input_ids": IDS, "max_new_tokens": 2, "do_sample": True} | call
    changes = call.pop("changes", {})
    config = tiny.config(changes.get("model_type", "deberta-v2"), **changes)
    model = Model(config, call.pop("head", "causal"))
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate(**call)


def test_absolute_positions_can_be_used_up():
    model = causal("electra")
    ids, mask = prompts("right")
    wide = nn.functional.pad(ids, (0, 20)), nn.functional.pad(mask, (0, 20))
    out = model.generate(*wide, max_new_tokens=48 - LONG)  # Padding takes no position.
    assert torch.equal(out[:, 38:], model.generate(ids, mask, max_new_tokens=NEW)[:, LONG:])
