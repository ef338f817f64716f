"""Corruption, losses and objectives: statistics, formulas and gradients."""

from dataclasses import replace

import pytest
import tiny
import torch
from closeness import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeberta.models import Model
from fastdeberta.pretraining import pair as pair_module
from fastdeberta.pretraining.batches import (
    CAUSAL,
    DISCRIMINATOR,
    GENERATOR,
    POLICY,
    Corruption,
    causal,
)
from fastdeberta.pretraining.corruption import (
    choose_positions,
    choose_spans,
    draw_positions,
    gumbel_sample,
    sample,
    split_masking,
)
from fastdeberta.pretraining.examples import Rows
from fastdeberta.pretraining.losses import copy_cross_entropy, linear_cross_entropy
from fastdeberta.pretraining.objectives import ADVERSARIAL, OBJECTIVES
from fastdeberta.training.draws import Draws

PAD, CLS, SEP, UNK, MASK = range(5)
SPECIAL = torch.zeros(67, dtype=torch.bool)
SPECIAL[[PAD, CLS, SEP, MASK]] = True

# Corruption


@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.25, 0.9])
def test_choose_positions(fraction):
    lengths = torch.tensor([0, 1, 2, 3, 7, 20, 63, 64])
    maskable = torch.rand(8, 64).argsort(1) < lengths[:, None]
    sequence = torch.arange(8).repeat_interleave(64)
    positions = choose_positions(maskable.flatten(), sequence, torch.rand(8 * 64), fraction)
    assert positions.dtype == torch.int64 and (positions.diff() > 0).all()
    assert maskable.flatten()[positions].all()
    expected = [min(n, max(1, round(n * fraction))) for n in lengths.tolist()]
    assert sequence[positions].bincount(minlength=8).tolist() == expected


def test_positions_are_chosen_evenly():
    maskable = torch.ones(4000, 10, dtype=torch.bool)
    maskable[:, 3] = False
    sequence = torch.arange(4000).repeat_interleave(10)
    positions = choose_positions(maskable.flatten(), sequence, torch.rand(40_000), 0.3)
    counts = (positions % 10).bincount(minlength=10)
    assert counts.sum() == 4000 * 3 and counts[3] == 0
    expected = 4000 * 3 / 9  # Of a fair draw, 8 degrees of freedom: above 35 once in 30,000.
    assert ((counts - expected).square() / expected)[maskable[0]].sum() < 35


def test_draws_with_replacement():
    """round(0.25 * 20) = 5 draws, special tokens counted, from 18: some meet the same token."""
    maskable = torch.ones(4000, 24, dtype=torch.bool)
    maskable[:, 0] = maskable[:, 19:] = False
    sequence = torch.arange(4000).repeat_interleave(24)
    lengths, tokens = torch.full((4000,), 24), torch.full((4000,), 20)
    numbers = torch.rand(4000 * 24)
    positions, weights = draw_positions(
        maskable.flatten(), sequence, numbers, 0.25, lengths, tokens
    )
    assert (positions.diff() > 0).all() and maskable.flatten()[positions].all()
    drawn = torch.zeros(4000).index_add(0, sequence[positions], weights)
    assert (drawn == 5).all()
    # Expected are 18 (1 - (17 / 18) ** 5) tokens a row.
    assert len(positions) / 4000 == pytest.approx(18 * (1 - (17 / 18) ** 5), abs=0.03)
    counts = torch.zeros(24).index_add(0, positions % 24, weights)[1:19]
    expected = 4000 * 5 / 18  # 17 degrees of freedom: above 52 once in 50,000.
    assert ((counts - expected).square() / expected).sum() < 52


def test_draws_are_capped():
    """At most int((0.15 + 0.005) * length) draws, at least one, none where nothing may be drawn."""
    maskable = torch.tensor([True] * 10 + [False] * 10 + [True] * 4)
    sequence = torch.tensor([0] * 10 + [1] * 10 + [2] * 4)
    lengths = torch.tensor([10, 10, 4])
    tokens = torch.tensor([10, 10, 4])
    for fraction, expected in ((0.15, 1), (0.55, 5)):
        _, weights = draw_positions(maskable, sequence, torch.rand(24), fraction, lengths, tokens)
        assert weights.sum() == expected + round(4 * fraction)


def spans_of(positions):
    """Lengths of the runs of chosen positions."""
    breaks = (positions.diff() > 1).nonzero().squeeze(1) + 1
    return torch.tensor([len(part) for part in positions.tensor_split(breaks)])


def test_span_lengths():
    """Of few spans in a long text next to none touch: runs are spans, p proportional to 1/n."""
    size = 400_000
    positions = choose_spans(
        torch.ones(size, dtype=torch.bool),
        torch.zeros(size, dtype=torch.long),
        torch.rand(size, 2),
        0.01,
        3,
    )
    assert len(positions) == 4000
    counts = spans_of(positions).bincount(minlength=4)[1:4].double()
    expected = counts.sum() * torch.tensor([6, 3, 2]) / 11
    assert (counts / expected - 1).abs().max() < 0.12
    uniform = counts.sum() / 3  # The negative control: the spans are not of even lengths.
    assert (counts / uniform - 1).abs().max() > 0.3


def test_spans_keep_to_words_runs_and_budget():
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        maskable = torch.rand(3 * 40, generator=generator) < 0.9
        starts = torch.rand(3 * 40, generator=generator) < 0.6
        sequence = torch.arange(3).repeat_interleave(40)
        numbers = torch.rand(3 * 40, 2, generator=generator)
        positions = choose_spans(maskable, sequence, numbers, 0.2, 3, starts)
        chosen = torch.zeros(120, dtype=torch.bool)
        chosen[positions] = True
        assert not (chosen & ~maskable).any()
        counts = sequence[positions].bincount(minlength=3)
        budget = (sequence[maskable].bincount() * 0.2).round()
        assert (counts >= 1).all() and (counts <= budget.clamp(min=5)).all()
        for t in range(1, 120):  # A word is chosen whole.
            inside = maskable[t] and maskable[t - 1] and not starts[t]
            if inside and sequence[t] == sequence[t - 1]:
                assert chosen[t] == chosen[t - 1]


def test_a_span_is_always_found():
    """A word longer than the budget, and spans that all reach too far."""
    positions = choose_spans(
        torch.ones(12, dtype=torch.bool),
        torch.tensor([0] * 10 + [1, 2]),
        torch.full((12, 2), 0.99),
        0.1,
        3,
        torch.tensor([True] + [False] * 11),
    )
    assert positions.tolist() == list(range(12))


def test_mask_split():
    """80/10/10, the random ones even among those allowed."""
    size, allowed = 60_000, torch.arange(5, 15)
    original = torch.full((size,), 20)
    put = split_masking(original, torch.rand(size, 2), MASK, allowed, 0.8, 0.1)
    counts = put.bincount(minlength=21)
    assert counts[MASK] / size == pytest.approx(0.8, abs=0.006)
    assert counts[20] / size == pytest.approx(0.1, abs=0.005)
    random = counts[5:15]
    assert random.sum() + counts[MASK] + counts[20] == size
    expected = random.sum() / 10  # 9 degrees of freedom: above 38 once in 40,000.
    assert ((random - expected).square() / expected).sum() < 38


@pytest.mark.parametrize("draw", ["inverse", "gumbel"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(draw, temperature):
    logits = torch.tensor([2.0, -1.0, 0.0, -torch.inf, 1.0, -2.0, 0.5, -torch.inf, -3.0])
    draws = 40_000
    rows = logits.expand(draws, -1)
    if draw == "gumbel":
        tokens = gumbel_sample(rows, temperature)
    else:
        tokens = sample(rows, torch.rand(draws), temperature)
    counts = tokens.bincount(minlength=9)
    expected = draws * (logits / temperature).softmax(-1)
    possible = expected > 0
    assert not counts[~possible].any()
    # 6 degrees of freedom: above 30 once in 25,000.
    assert ((counts - expected).square() / expected)[possible].sum() < 30


def test_sample_forms():
    logits = torch.randn(2, 3, 7, dtype=torch.bfloat16).requires_grad_()
    tokens = sample(logits, torch.rand(2, 3))
    assert tokens.shape == (2, 3) and tokens.dtype == torch.int64 and not tokens.requires_grad
    certain = torch.full((100, 7), -torch.inf).index_fill_(1, torch.tensor(6), 0.0)
    assert (sample(certain, torch.linspace(0, 1 - 1e-7, 100)) == 6).all()


# Batches

LENGTHS = (40, 30, 17, 5, 40, 23)


def texts():
    """Six sequences [CLS] tokens [SEP] tokens [SEP], and their segments."""
    found = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(5, 67, (length,), generator=torch.Generator().manual_seed(i))
        ids[0], ids[length // 2], ids[-1] = CLS, SEP, SEP
        found.append((ids, (torch.arange(length) > length // 2).long()))
    return found


def padded(numbers=range(6)):
    sequences = [texts()[i] for i in numbers]
    ids = nn.utils.rnn.pad_sequence([s[0] for s in sequences], True, PAD)
    types = nn.utils.rnn.pad_sequence([s[1] for s in sequences], True)
    mask = ids != PAD
    return Rows(ids, None if mask.all() else mask, types)


def packed(numbers=range(6)):
    """One sequence a row: rows of several lengths."""
    sequences = [texts()[i] for i in numbers]
    lengths = torch.tensor([len(s[0]) for s in sequences])
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    ids, types = (torch.cat(parts) for parts in zip(*sequences, strict=True))
    return Rows(ids, None, types, cu_seqlens, int(lengths.max())), lengths


CORRUPTIONS = {
    "masked": {},
    "google": {"replacement": True, "mask_token_fraction": 0.85},
    "bert": {"mask_token_fraction": 0.8, "random_token_fraction": 0.1},
    "spans": {"max_ngram": 3, "starts_word": torch.arange(67) % 3 > 0},
    "uniform": {"proposals": (~SPECIAL).double().cumsum(0)},
}


def corrupted(name="masked", rows=None, draws=None, phase="", **options):
    rows = rows or padded()
    lengths = None
    if isinstance(rows, tuple) and not isinstance(rows, Rows):
        rows, lengths = rows
    count = len(lengths if lengths is not None else rows.input_ids)
    draws = draws or Draws(0, 0, 0, count, count)
    corrupt = Corruption(MASK, SPECIAL, **{"fraction": 0.3, **CORRUPTIONS[name], **options})
    return corrupt(rows, draws, phase, lengths)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("layout", [padded, packed])
def test_corruption(name, layout):
    batch = corrupted(name, layout())
    ids, inputs = batch.input_ids.flatten(), batch.inputs.flatten()
    assert torch.equal(batch.targets, ids[batch.positions])
    assert not SPECIAL[batch.targets].any()
    untouched = torch.ones_like(ids, dtype=torch.bool)
    untouched[batch.positions] = False
    assert torch.equal(ids[untouched], inputs[untouched])
    if name in ("masked", "spans"):
        assert (inputs[batch.positions] == MASK).all()
    if name == "uniform":
        assert not SPECIAL[inputs[batch.positions]].any() and batch.numbers is None
    if name == "google":
        assert batch.chosen >= len(batch.positions)
    if batch.cu_seqlens is None:
        assert torch.bincount(batch.positions // 40, minlength=6).min() >= 1, "one a sequence"


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("layout", [padded, packed])
def test_no_number_depends_on_how_a_step_is_divided(name, layout):
    whole = corrupted(name, layout())
    parts = [
        corrupted(name, layout(range(start, end)), Draws(0, 0, start, end - start, 6))
        for start, end in ((0, 1), (1, 4), (4, 6))
    ]

    def real(batch):
        kept = slice(None) if batch.attention_mask is None else batch.attention_mask
        return batch.inputs[kept].flatten()

    assert torch.equal(real(whole), torch.cat([real(p) for p in parts]))
    for field in ("targets", "weights", "numbers"):
        values = [getattr(p, field) for p in parts]
        if values[0] is not None:
            assert torch.equal(getattr(whole, field), torch.cat(values)), field


def test_padded_and_packed_batches_are_corrupted_alike():
    one, other = corrupted(rows=padded()), corrupted(rows=packed())
    assert torch.equal(one.inputs[one.attention_mask], other.inputs)
    assert torch.equal(one.numbers, other.numbers)
    assert one.tokens == other.tokens == sum(LENGTHS)
    assert one.lengths().tolist() == other.lengths().tolist() == list(LENGTHS)


def test_packed_rows_of_several_lengths_must_be_told():
    rows, _ = packed()
    with pytest.raises(ValueError, match="row_lengths must be given for packed rows"):
        Corruption(MASK, SPECIAL)(rows, Draws(0, 0, 0, 4, 4))


def test_causal_batches():
    for rows in (padded(), packed()[0]):
        batch = causal(rows, CAUSAL)
        assert len(batch.positions) == sum(LENGTHS) - 6
        ids = rows.input_ids.flatten()
        assert torch.equal(batch.targets, ids[batch.positions + 1])
        assert not (batch.targets == CLS).any() and not (batch.targets == PAD).any()


# Losses


@pytest.mark.parametrize("max_logits", [1, 50, 70, 10_000])
def test_linear_cross_entropy(max_logits):
    """Value and gradients in float64, of every row's own weight, in chunks of 1, 2, 3 and 7."""
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((7, 5), (23, 5), (23,)))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    targets = torch.tensor([0, 22, 3, 3, 5, 7, 1])
    seen = []

    def read(logits, rows):
        seen.append(len(logits))
        return logits.argmax(-1)

    losses, found = linear_cross_entropy(*inputs, targets, read, max_logits)
    logits = x @ weight.T + bias
    expected = nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert torch.equal(found, logits.argmax(-1)) and not found.requires_grad
    assert max(seen) == min(7, max(1, max_logits // 23))
    rows = torch.randn(7, dtype=torch.float64)
    ours = torch.autograd.grad((losses * rows).sum(), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad((expected * rows).sum(), inputs))

    def run(*inputs):
        return linear_cross_entropy(*inputs, targets, max_logits=max_logits)[0]

    assert torch.autograd.gradcheck(run, inputs)


def test_linear_cross_entropy_of_nothing():
    x = torch.randn(0, 5, requires_grad=True)
    losses, found = linear_cross_entropy(
        x, torch.randn(9, 5), torch.zeros(9), torch.zeros(0, dtype=torch.long), lambda *_: 1 / 0
    )
    losses.sum().backward()
    assert losses.shape == found.shape == (0,) and x.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_in_low_precision(dtype):
    x, weight, bias = torch.randn(40, 32), torch.randn(90, 32), torch.randn(90)
    targets = torch.randint(90, (40,))

    def run(loss, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        value = loss(*inputs)
        grads = torch.autograd.grad(value.sum(), inputs)
        return dict(zip(("loss", "x", "weight", "bias"), (value, *grads), strict=True))

    def ours(x, weight, bias):
        return linear_cross_entropy(x, weight, bias, targets, max_logits=900)[0]

    def peer(x, weight, bias):
        logits = nn.functional.linear(x, weight, bias)
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    assert_close(run(ours, dtype), run(peer, dtype), run(peer, torch.float64), dtype)


def test_linear_cross_entropy_under_autocast():
    x, weight = (torch.randn(n, 32, requires_grad=True) for n in (8, 90))
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = linear_cross_entropy(x, weight, torch.zeros(90), torch.arange(8))
    losses.sum().backward()
    logits = (x.bfloat16() @ weight.bfloat16().T).float()
    expected = nn.functional.cross_entropy(logits, torch.arange(8), reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
    assert losses.dtype == weight.grad.dtype == torch.float32 and weight.grad.any()


class Largest(TorchDispatchMode):
    """The largest tensor that an operator returned, in numbers."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, torch.Tensor):
                self.numbers = max(self.numbers, part.numel())
        return result


def test_logits_are_never_held_as_a_whole():
    """300 rows of 8,000 logits, forward and backward; plain cross-entropy is the control."""
    x = torch.randn(300, 4, requires_grad=True)
    weight, bias = torch.randn(8000, 4, requires_grad=True), torch.zeros(8000, requires_grad=True)
    targets = torch.arange(300)
    with Largest() as ours:
        losses, _ = linear_cross_entropy(x, weight, bias, targets, max_logits=80_000)
        losses.sum().backward()
    assert ours.numbers <= 80_000
    with Largest() as plain:
        logits = nn.functional.linear(x, weight, bias)
        nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    assert plain.numbers >= 300 * 8000


def test_copy_cross_entropy():
    """Against p(v) = D 1[input = v] + (1 - D) softmax(v), written out in float64."""
    logits, gate = torch.randn(6, 9).double(), torch.randn(6).double()
    inputs, targets = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 2, 3, 0, 0, 0])
    leaves = [logits.requires_grad_(), gate.requires_grad_()]
    token_loss = nn.functional.cross_entropy(logits, targets, reduction="none")
    ours = copy_cross_entropy(token_loss, gate, inputs == targets)
    d = gate.sigmoid()[:, None]
    p = d * nn.functional.one_hot(inputs, 9) + (1 - d) * logits.softmax(-1)
    torch.testing.assert_close(p.sum(-1), torch.ones(6).double())
    expected = -p[torch.arange(6), targets].log()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    )
    sure = torch.tensor([80.0, -80.0, 80.0, -80.0])
    copied = torch.tensor([True, True, False, False])
    extreme = copy_cross_entropy(torch.full((4,), 3.0), sure, copied)
    torch.testing.assert_close(extreme, torch.tensor([0.0, 3.0, 83.0, 3.0]))


# Objectives

ENCODERS = {
    "v1": ("deberta", {}),
    "v2": ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    "v3": ("deberta-v2", {}),
    "electra": ("electra", {}),
    "emd": ("deberta-v2", {"emd": True}),
    "no-c2p": ("deberta-v2", {"pos_att_type": ["p2c"]}),
    "no-p2c": ("deberta", {"pos_att_type": ["c2p"], "emd": True}),
}


def objective_of(name="electra", encoder="v3", tie="none", generator=(), adversarial=False, **more):
    family, changes = ENCODERS[encoder]
    config = tiny.config(family, **{"type_vocab_size": 2, **changes})
    kind = (ADVERSARIAL if adversarial else OBJECTIVES)[name]
    if name in ("mlm", "mlm+ar"):
        return tiny.randomize(kind(config))
    options = {"generator": replace(config, **dict(generator)), "tie": tie, **more}
    return tiny.randomize(kind(config, **options))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_padded_and_packed_batches_have_one_loss(name, encoder):
    objective = objective_of(name, encoder)
    phases = ["", CAUSAL] if name == "mlm+ar" and encoder != "v2" else [""]
    for phase in phases:
        results = []
        for rows in (padded(), packed()):
            batch = corrupted(rows=rows)
            if phase:
                batch = causal(rows if isinstance(rows, Rows) else rows[0], phase)
            sums, counts = objective(batch), objective.counts(batch)
            assert sums.keys() == counts.keys()
            observed = objective.observe(batch)
            results.append((sums, counts, {k: v.double().sum() for k, v in observed.items()}))
        (one, count, seen), (other, again, also) = results
        assert count == again
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(seen, also, rtol=1e-4, atol=1e-3)
        for key, value in one.items():
            if key in seen:  # Evaluation has the losses of training.
                torch.testing.assert_close(value.double(), seen[key], rtol=1e-4, atol=1e-3)


def test_segments_matter():
    objective = objective_of()
    batch = corrupted()
    without = objective(batch._replace(token_type_ids=None))
    assert (objective(batch)["rtd_loss"] - without["rtd_loss"]).abs() > 1e-3


def generated(objective, batch):
    """Logits at the chosen positions and what the samples make of the text, of the whole model."""
    output = objective.generator(
        batch.inputs, batch.attention_mask, batch.token_type_ids
    ).logits.flatten(0, 1)[batch.positions]
    samples = sample(output, batch.numbers)
    ids = batch.input_ids.flatten().index_copy(0, batch.positions, samples)
    return output, samples, ids.view_as(batch.input_ids)


@pytest.mark.parametrize("name", ["electra", "electra_15"])
def test_replaced_token_detection_by_hand(name):
    """Every loss of a batch with padding, token by token in float64."""
    objective = objective_of(name, "electra")
    batch = corrupted()
    sums, counts = objective(batch), objective.counts(batch)
    logits, _, ids = generated(objective, batch)
    rtd = objective.discriminator(ids, batch.attention_mask, batch.token_type_ids).logits
    mlm = -logits.double().log_softmax(-1)[torch.arange(len(logits)), batch.targets]
    probability = rtd.double().sigmoid()
    scored = batch.attention_mask.clone()
    if name == "electra_15":
        scored = torch.zeros_like(scored).flatten()
        scored[batch.positions] = True
        scored = scored.view_as(ids)
    expected = sum(
        -(probability[place] if ids[place] != batch.input_ids[place] else 1 - probability[place])
        .log()
        .item()
        for place in map(tuple, scored.nonzero().tolist())
    )
    assert (ids != batch.input_ids).any()
    assert counts == {"mlm_loss": len(batch.positions), "rtd_loss": int(scored.sum())}
    torch.testing.assert_close(sums["mlm_loss"].double(), mlm.sum(), rtol=1e-5, atol=1e-4)
    assert sums["rtd_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_repeated_draws_count_as_often():
    objective = objective_of()
    batch = corrupted("google", fraction=0.6)
    assert batch.weights.max() > 1
    losses = nn.functional.cross_entropy(
        generated(objective, batch)[0], batch.targets, reduction="none"
    )
    torch.testing.assert_close(objective(batch)["mlm_loss"], (losses * batch.weights).sum())
    assert objective.counts(batch)["mlm_loss"] == batch.weights.sum() > len(losses)


def test_a_sample_equal_to_the_original_was_not_replaced(monkeypatch):
    batch = corrupted()
    monkeypatch.setattr(pair_module, "sample", lambda *_: batch.targets)
    objective = objective_of()
    observed = objective.observe(batch)
    assert not observed["replaced"].any() and len(observed["replaced"]) == sum(LENGTHS)


def test_the_vocabulary_product_runs_on_chosen_positions_only():
    objective = objective_of("electra")
    seen = []
    objective.generator.head.dense.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape)
    )
    batch = corrupted()
    objective(batch)
    assert seen == [(len(batch.positions), 32)]


def test_the_discriminator_of_replace_mlm_reads_samples():
    objective = objective_of("replace_mlm")
    batch = corrupted()
    _, _, ids = generated(objective, batch)
    logits = objective.discriminator(ids, batch.attention_mask, batch.token_type_ids).logits
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1)[batch.positions], batch.targets, reduction="sum"
    )
    torch.testing.assert_close(objective(batch)["replace_mlm_loss"], expected)


def test_all_tokens_mlm_by_its_formula():
    objective = objective_of("all_tokens_mlm")
    batch = corrupted()
    _, _, ids = generated(objective, batch)
    output = objective.discriminator(ids, batch.attention_mask, batch.token_type_ids)
    d = objective.gate(output.last_hidden_state).sigmoid().double()
    copy = nn.functional.one_hot(ids, 67)
    p = d * copy + (1 - d) * output.logits.double().softmax(-1)
    right = p.gather(-1, batch.input_ids[..., None]).squeeze(-1)
    kept = batch.attention_mask
    observed = objective.observe(batch)
    torch.testing.assert_close(
        observed["all_tokens_mlm_loss"].double(), -right.log()[kept], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(observed["all_tokens_mlm_accuracy"], (p.argmax(-1) == batch.input_ids)[kept])
    assert objective.counts(batch)["all_tokens_mlm_loss"] == sum(LENGTHS)
    assert len(observed["all_tokens_mlm_accuracy_replaced"]) == (ids != batch.input_ids).sum()


def test_causal_and_masked_steps_share_one_network():
    objective = objective_of("mlm+ar")
    rows = padded()
    batch = causal(rows, CAUSAL)
    model = Model(objective.model.config, "causal").eval()
    model.load_state_dict(objective.model.state_dict())
    labels = rows.input_ids.masked_fill(~rows.attention_mask, -100)
    expected = model(rows.input_ids, rows.attention_mask, rows.token_type_ids, labels=labels).loss
    loss = objective(batch)["ar_loss"] / objective.counts(batch)["ar_loss"]
    torch.testing.assert_close(loss, expected)


# Gradients


def gradients(objective, batch, name):
    """Gradients by parameter of one loss alone; those that are not reached are left out."""
    objective.zero_grad()
    objective(batch)[name].backward()
    found = objective.named_parameters()
    return {n: p.grad.clone() for n, p in found if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("encoder", ["v3", "electra", "emd"])
@pytest.mark.parametrize("name", ["electra", "electra_15", "replace_mlm", "all_tokens_mlm"])
def test_no_gradient_passes_the_samples(name, encoder):
    objective = objective_of(name, encoder)
    batch = corrupted()
    reached = gradients(objective, batch, objective.name)
    assert reached and not [n for n in reached if n.startswith("generator.")]
    reached = gradients(objective, batch, "mlm_loss")
    assert reached and all(n.startswith("generator.") for n in reached)


@pytest.mark.parametrize("encoder", ["v3", "electra", "emd"])
@pytest.mark.parametrize("name", ["electra", "replace_mlm", "all_tokens_mlm"])
def test_gdes_moves_the_generators_tables_by_its_own_loss_alone(name, encoder):
    objective = objective_of(name, encoder, "gdes")
    batch = corrupted()
    tables = ["word_embeddings", "token_type_embeddings"]
    # The mask decoder's positions are shared where both networks have one.
    if encoder == "electra" or (encoder == "emd" and name != "electra"):
        tables.append("position_embeddings")
    own = gradients(objective, batch, objective.name)
    assert not [n for n in own if n.startswith("generator.")]
    mlm = gradients(objective, batch, "mlm_loss")
    assert not [n for n in mlm if n.startswith("discriminator.")]
    both = objective(batch)
    objective.zero_grad()
    (both["mlm_loss"] + 50 * both[objective.name]).backward()
    for table in tables:
        assert f"discriminator.backbone.embeddings.{table}._weight" in own
        parameter = f"generator.backbone.embeddings.{table}.weight"
        grad = dict(objective.named_parameters())[parameter].grad
        torch.testing.assert_close(grad, mlm[parameter])


def test_tied_tables_are_moved_by_both_losses():
    """The negative control of the test above."""
    objective = objective_of("electra", "v3", "embeddings")
    table = "generator.backbone.embeddings.word_embeddings.weight"
    for name in ("mlm_loss", "rtd_loss"):
        assert table in gradients(objective, corrupted(), name)


@pytest.mark.parametrize("name", ["electra", "all_tokens_mlm"])
def test_phases_of_two_stages(name):
    objective = objective_of(name, tie="gdes")
    batch = corrupted(phase=GENERATOR)
    assert objective(batch).keys() == objective.counts(batch).keys() == {"mlm_loss"}
    batch = corrupted(phase=DISCRIMINATOR)
    sums = objective(batch)
    assert not sums["mlm_loss"].requires_grad, "frozen, but logged"
    reached = gradients(objective, batch, objective.name)
    assert reached and all(n.startswith("discriminator.") or n == "gate.weight" for n in reached)


def adversarial(temperature=1.0, name="electra"):
    objective = objective_of(
        name, "v3", adversarial=True, sampling="multinomial", temperature=temperature
    )
    return objective.double()


@pytest.mark.parametrize("name", ["electra", "electra_15"])
def test_reinforce_by_hand(name):
    """Policy and baseline, in float64, from their derivatives written out.

    d policy / d logits = (R - b) (softmax - one-hot of the sample); of the head's bias, its sum.
    d baseline / d w = sum of (sigmoid(w h) - exp(-R)) h.
    """
    objective, batch = adversarial(name=name), corrupted(phase=POLICY)
    n = len(batch.positions)
    logits, samples, ids = generated(objective, batch)
    # One sample is what stood there, behind its [MASK].
    originals = batch.input_ids.flatten().index_copy(0, batch.positions[:1], samples[:1])
    batch = batch._replace(
        targets=originals[batch.positions], input_ids=originals.view_as(batch.input_ids)
    )
    rtd = objective.discriminator(ids, batch.attention_mask, batch.token_type_ids).logits
    rtd = rtd.flatten()[batch.positions]
    replaced = samples != batch.targets
    assert replaced.any() and not replaced.all()
    reward = -torch.where(replaced, rtd.sigmoid(), 1 - rtd.sigmoid()).log()
    hidden = objective.generator(
        batch.inputs, batch.attention_mask, batch.token_type_ids
    ).last_hidden_state.flatten(0, 1)[batch.positions]
    estimate = (hidden @ objective.baseline.weight.T).squeeze(-1).sigmoid()
    advantage = reward + estimate.log()
    one_hot = nn.functional.one_hot(samples, 67)
    for_bias = (advantage[:, None] * (logits.softmax(-1) - one_hot)).sum(0)
    for_w = ((estimate - (-reward).exp())[:, None] * hidden).sum(0, keepdim=True)

    sums = objective(batch)
    policy = -(advantage * logits.log_softmax(-1)[torch.arange(n), samples]).sum()
    torch.testing.assert_close(sums["policy_loss"], policy, rtol=1e-6, atol=1e-6)
    reached = gradients(objective, batch, "policy_loss")
    assert all(name.startswith("generator.") for name in reached), "the reward is a constant"
    torch.testing.assert_close(reached["generator.head.bias"], for_bias, rtol=1e-6, atol=1e-6)
    reached = gradients(objective, batch, "baseline_loss")
    assert list(reached) == ["baseline.weight"]
    torch.testing.assert_close(reached["baseline.weight"], for_w, rtol=1e-6, atol=1e-6)
    assert objective.counts(batch)["policy_loss"] == n
    assert not sums["mlm_loss"].requires_grad and sums["rtd_loss"].requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reinforce_is_unbiased(temperature, monkeypatch):
    """Over all tokens that one position may get, weighted by their probability, the policy's
    gradient is that of the expected reward."""
    objective = adversarial(temperature)
    batch = corrupted(rows=padded([0]), phase=POLICY, fraction=0.01)
    assert len(batch.positions) == 1
    logits, _, _ = generated(objective, batch)
    p = (logits[0] / temperature).softmax(-1)
    found = torch.zeros(67, dtype=torch.float64)
    rewards = torch.empty(67, dtype=torch.float64)
    for token in range(67):
        sampled = torch.tensor([token])
        monkeypatch.setattr(pair_module, "sample", lambda *_, sampled=sampled: sampled)
        grads = gradients(objective, batch, "policy_loss")
        found += p[token].detach() * grads["generator.head.bias"]
        ids = batch.input_ids.flatten().index_copy(0, batch.positions, sampled)[None]
        rewards[token] = objective.detection_losses(batch, ids)[batch.positions].detach()
    bias = objective.generator.head.bias
    expected = torch.autograd.grad(-(p * rewards).sum(), bias)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert expected.abs().max() > 1e-4


def test_the_warm_start_follows_the_masked_language_model():
    objective, batch = adversarial(), corrupted()
    assert objective(batch).keys() == {"mlm_loss", "rtd_loss", "baseline_loss"}
    assert "generator.head.bias" in gradients(objective, batch, "mlm_loss")
