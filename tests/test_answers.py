"""Span and entity heads against their equations, written out, and against exhaustive search."""

import copy
import itertools
import math

import pytest
import tiny
import torch
from closeness import assert_close
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    gelu,
    log_softmax,
)

from fastdeberta.models import Config, Model
from fastdeberta.models.answers import MASKED, BeamSpanHead, EntityHead, SpanHead
from fastdeberta.models.encoded import Encoded, ModelOutput, Targets

LENGTH, HIDDEN = 7, 6
LENGTHS = torch.tensor([7, 5, 2])
MASK = torch.arange(LENGTH) < LENGTHS[:, None]
# Of the last row every token belongs to one segment.
TYPES = (torch.arange(LENGTH) >= torch.tensor([3, 2, 9])[:, None]).long() * MASK
TABLE = torch.zeros(1, HIDDEN)


def head_of(kind, **changes):
    torch.manual_seed(0)
    head = kind(Config(hidden_size=HIDDEN, num_attention_heads=2, span_hidden_size=5, **changes))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return head.double().eval()


def states(*shape, dtype=torch.float64):
    shape = shape or (3, LENGTH, HIDDEN)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def fill(head, hidden, targets=None, **inputs):
    output = ModelOutput(hidden)
    head.fill(output, Encoded(hidden, TABLE, **inputs), Targets(**(targets or {})))
    return output


def packed(x: Tensor):
    """The real tokens of a padded batch, end to end, and where they start."""
    return x[MASK], torch.tensor([0, 7, 12, 14], dtype=torch.int32)


# Linear span head


def test_linear_span_loss_by_hand():
    head, hidden = head_of(SpanHead), states()
    # The second row's start and the third row's end lie past the sequence; -1 is the first token.
    start, end = torch.tensor([2, LENGTH, -1]), torch.tensor([4, 1, LENGTH + 9])
    output = fill(head, hidden, {"start_positions": start, "end_positions": end})
    logits = hidden @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(output.start_logits, logits[..., 0])
    torch.testing.assert_close(output.end_logits, logits[..., 1])
    log_probs = logits.log_softmax(1)
    starts = (log_probs[0, 2, 0] + log_probs[2, 0, 0]) / 2
    ends = (log_probs[0, 4, 1] + log_probs[1, 1, 1]) / 2
    torch.testing.assert_close(output.loss, -(starts + ends) / 2)


def test_linear_span_loss_is_transformers():
    """Out-of-range targets, as its source computes them, with gradients."""
    head, hidden = head_of(SpanHead), states()
    start, end = torch.tensor([2, LENGTH, -1]), torch.tensor([4, 1, LENGTH + 9])
    ours = fill(head, hidden, {"start_positions": start, "end_positions": end}).loss
    got = torch.autograd.grad(ours, head.classifier.weight)
    logits = head.classifier(hidden)
    theirs = sum(
        cross_entropy(logits[..., i], position.clamp(0, LENGTH), ignore_index=LENGTH) / 2
        for i, position in enumerate((start, end))
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(got, torch.autograd.grad(theirs, head.classifier.weight))


@pytest.mark.parametrize("kind", [SpanHead, BeamSpanHead])
def test_targets_past_the_end_alone_cost_nothing(kind):
    head = head_of(kind, span_answerable=False)
    past = torch.full((3,), LENGTH)
    output = fill(head, states(), {"start_positions": past, "end_positions": past})
    assert output.loss == 0
    output.loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in head.parameters())


def test_linear_span_leaves_padding_out():
    head, hidden = head_of(SpanHead), states()
    targets = {"start_positions": torch.tensor([2, 1, 0]), "end_positions": torch.tensor([4, 1, 1])}
    output = fill(head, hidden, targets, mask=MASK.long())
    assert (output.start_logits[~MASK] == MASKED).all()
    assert (output.start_logits[MASK] > MASKED).all()
    noise = hidden + 9 * ~MASK[..., None]
    torch.testing.assert_close(fill(head, noise, targets, mask=MASK.long()).loss, output.loss)
    assert (fill(head, noise, targets).loss - output.loss).abs() > 0.1


# Beam span head


def transcription(head, hidden, allowed):
    """log P(start) [B, L], log P(end | start) [B, L, L] for all pairs, logit of impossible [B]."""
    dense = head.end_dense.weight
    all_starts, all_ends, impossible = [], [], []
    for x, may in zip(hidden, allowed, strict=True):
        mask = torch.where(may, 0, -torch.inf)
        starts = log_softmax((x @ head.start.weight.T + head.start.bias).squeeze(-1) + mask, 0)
        all_starts.append(starts)
        ends = [
            log_softmax(
                torch.stack(
                    [
                        gelu(dense @ torch.cat([start, token]) + head.end_dense.bias)
                        @ head.end.weight[0]
                        + head.end.bias[0]
                        for token in x
                    ]
                )
                + mask,
                0,
            )
            for start in x
        ]
        all_ends.append(torch.stack(ends))
        if head.answerable:
            mean = sum(p * token for p, token in zip(starts.exp(), x, strict=True))
            feature = gelu(head.impossible_dense(torch.cat([x[0], mean])))
            impossible.append(head.impossible(feature).squeeze())
    return (
        torch.stack(all_starts),
        torch.stack(all_ends),
        torch.stack(impossible) if impossible else None,
    )


# What may be an answer's token: written out for MASK and TYPES, [CLS] always.
ALLOWED = {
    "all": torch.ones(3, LENGTH, dtype=torch.bool),
    "mask": MASK,
    "types": torch.tensor(
        [[1, 0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    ).bool(),
    "given": torch.tensor(
        [[1, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    ).bool(),
    "nothing": torch.tensor([[1, 0, 0, 0, 0, 0, 0]] * 3) > 0,
}
GIVEN = torch.tensor([[0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]])
INPUTS = {
    "all": {},
    "mask": {"mask": MASK.long(), "token_type_ids": torch.zeros_like(TYPES)},
    "types": {"mask": MASK, "token_type_ids": TYPES},
    "given": {"mask": MASK, "token_type_ids": TYPES, "answer_mask": GIVEN},
    "nothing": {"mask": torch.zeros_like(MASK)},
}


@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize("answerable", [True, False], ids=["answerable", "spans-only"])
def test_beam_equations(which, answerable):
    """The loss is conditioned on the true start. Of the rows one has an answer, two have none."""
    head = head_of(BeamSpanHead, span_answerable=answerable, span_answerable_weight=0.3)
    hidden, allowed = states(), ALLOWED[which]
    one = int(allowed[0].nonzero()[-1])
    start, end = torch.tensor([one, 0, 0]), torch.tensor([one, 0, 0])
    impossible = torch.tensor([0, 1, 1])
    targets = {"start_positions": start, "end_positions": end, "is_impossible": impossible}
    output = fill(head, hidden, targets, **INPUTS[which])
    starts, ends, logits = transcription(head, hidden, allowed)
    rows = torch.arange(3)
    expected = -(starts[rows, start] + ends[rows, start, end]) / 2
    if answerable:
        torch.testing.assert_close(output.impossible_logits, logits)
        probs = torch.where(impossible.bool(), logits.sigmoid(), 1 - logits.sigmoid())
        expected = expected - 0.3 * probs.log()
    else:
        assert output.impossible_logits is None
    torch.testing.assert_close(output.loss, expected.mean())
    torch.testing.assert_close(
        log_softmax(output.start_logits, 1)[allowed], starts[allowed], rtol=1e-9, atol=1e-9
    )
    assert (output.start_logits[~allowed] == MASKED).all()
    assert (output.end_logits[~allowed] == MASKED).all()


@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize("size", [1, 2, 3, LENGTH, 20])
def test_beam_is_exhaustive_search(which, size):
    """Of every width: the same spans in the same order as sorting all pairs (start, end)."""
    head, hidden, allowed = head_of(BeamSpanHead, span_beam_size=size), states(), ALLOWED[which]
    beam = fill(head, hidden, **INPUTS[which]).beam
    width = min(size, LENGTH)
    assert beam.start_index.shape == beam.start_log_probs.shape == (3, width)
    assert beam.end_index.shape == beam.end_log_probs.shape == (3, width, width)
    with torch.no_grad():
        starts, ends, _ = transcription(head, hidden, allowed)
    for row, may in enumerate(allowed):
        tokens = may.nonzero().flatten().tolist()
        best_starts = sorted(tokens, key=lambda i: -starts[row, i])[:width]
        found = {
            (int(beam.start_index[row, i]), int(beam.end_index[row, i, j])): float(
                beam.start_log_probs[row, i].detach() + beam.end_log_probs[row, i, j].detach()
            )
            for i, j in itertools.product(range(width), repeat=2)
            if beam.start_log_probs[row, i] > -1000 and beam.end_log_probs[row, i, j] > -1000
        }
        pairs = {
            (i, j): float(starts[row, i] + ends[row, i, j])
            for i in best_starts
            for j in sorted(tokens, key=lambda j: -ends[row, i, j])[:width]
        }
        assert list(found) == list(pairs)
        assert found == pytest.approx(pairs, abs=1e-9)
        if size >= LENGTH:
            every = {
                (i, j): float(starts[row, i] + ends[row, i, j])
                for i, j in itertools.product(tokens, repeat=2)
            }
            assert max(found, key=found.get) == max(every, key=every.get)
            assert found == pytest.approx(every, abs=1e-9)
            assert sum(map(math.exp, found.values())) == pytest.approx(1)


def test_ends_depend_on_the_start():
    """What tells this head from two linear layers, and the tests above from empty ones."""
    head, hidden = head_of(BeamSpanHead), states()
    _, ends, _ = transcription(head, hidden, ALLOWED["all"])
    assert (ends[:, 0] - ends[:, 1]).abs().max() > 0.1
    given = {}
    for start in (1, 2):
        targets = {
            "start_positions": torch.full((3,), start),
            "end_positions": torch.ones(3).long(),
        }
        given[start] = log_softmax(fill(head, hidden, targets).end_logits, 1)
        torch.testing.assert_close(given[start], ends[:, start])
    assert (given[1] - given[2]).abs().max() > 0.1
    head.end_dense.weight.data[:, :HIDDEN] = 0
    ends = fill(head, hidden).beam.end_log_probs
    torch.testing.assert_close(ends, ends[:, :1].expand_as(ends))


def test_ties_go_to_the_earlier_token():
    head = head_of(BeamSpanHead, span_beam_size=3)
    beam = fill(head, torch.ones(2, 600, HIDDEN).double()).beam
    assert (beam.start_index == torch.arange(3)).all()
    assert (beam.end_index == torch.arange(3)).all()


def test_whether_there_is_an_answer():
    """Without is_impossible it is read off the start; the other way round the loss is another."""
    head, hidden = head_of(BeamSpanHead), states()
    targets = {"start_positions": torch.tensor([2, 0, 0]), "end_positions": torch.tensor([4, 0, 0])}

    def loss(*impossible):
        return fill(head, hidden, {**targets, "is_impossible": torch.tensor(impossible)}).loss

    assert torch.equal(fill(head, hidden, targets).loss, loss(False, True, True))
    torch.testing.assert_close(loss(0.0, 1.0, 1.0), loss(0, 1, 1))
    assert (loss(1, 0, 0) - loss(0, 1, 1)).abs() > 0.01


def test_a_start_past_the_end_has_no_end():
    head, hidden = head_of(BeamSpanHead, span_answerable=False), states()

    def loss(start, end, rows=3):
        targets = {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
        return fill(head, hidden[:rows], targets).loss

    torch.testing.assert_close(loss([2, 1, LENGTH], [4, 1, 3]), loss([2, 1], [4, 1], rows=2))
    torch.testing.assert_close(loss([2, 1, -1], [4, 1, -1]), loss([2, 1, 0], [4, 1, 0]))


def test_the_search_runs_unless_a_loss_is_trained():
    head, hidden = head_of(BeamSpanHead), states()
    targets = {"start_positions": torch.tensor([2, 0, 0]), "end_positions": torch.tensor([4, 0, 0])}
    both = fill(head, hidden, targets)
    assert both.loss is not None and both.beam is not None
    head.train()
    trained = fill(head, hidden, targets)
    assert trained.beam is None and torch.equal(trained.loss, both.loss)
    assert torch.equal(fill(head, hidden).beam.end_index, both.beam.end_index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_types(dtype):
    hidden, allowed = states(dtype=dtype), ALLOWED["types"]
    start, end = torch.tensor([3, 0, 1]), torch.tensor([4, 0, 1])
    head = head_of(BeamSpanHead).to(dtype)
    targets = {"start_positions": start, "end_positions": end}

    def plain(head):
        """The head as one would write it, without care for narrow types."""
        x = hidden.to(head.start.weight.dtype)
        penalty = torch.zeros(allowed.shape, dtype=x.dtype).masked_fill(~allowed, MASKED)
        starts = head.start(x).squeeze(-1) + penalty
        both = torch.cat([x[range(3), start].unsqueeze(1).expand_as(x), x], -1)
        ends = head.end(gelu(head.end_dense(both))).squeeze(-1) + penalty
        mean = (starts.softmax(1).unsqueeze(-1) * x).sum(1)
        feature = gelu(head.impossible_dense(torch.cat([x[:, 0], mean], -1)))
        impossible = head.impossible(feature).squeeze(-1)
        spans = cross_entropy(starts, start) + cross_entropy(ends, end)
        labels = (start == 0).to(x.dtype)
        answerable = binary_cross_entropy_with_logits(impossible, labels)
        return starts, ends, impossible, spans / 2 + answerable / 2

    def ours(head):
        output = fill(head, hidden, targets, mask=MASK, token_type_ids=TYPES)
        assert output.start_logits.isfinite().all() and output.end_logits.isfinite().all()
        assert output.beam.end_log_probs.isfinite().all()
        return output.start_logits, output.end_logits, output.impossible_logits, output.loss

    def results(run, head):
        starts, ends, impossible, loss = run(head)
        parameters = dict(head.named_parameters())
        gradients = torch.autograd.grad(loss, parameters.values())
        values = {"starts": starts[allowed], "ends": ends[allowed]}
        values |= {"impossible": impossible, "loss": loss}
        return values | dict(zip(parameters, gradients, strict=True))

    truth = results(plain, copy.deepcopy(head).double())
    assert_close(results(ours, head), results(plain, head), truth, dtype)
    assert torch.tensor(2 * MASKED, dtype=dtype).isfinite()


# Entity head

SPANS = torch.tensor(
    [
        [[1, 3], [3, 4], [2, 7]],  # Entities may overlap.
        [[1, 2], [4, 6], [-1, -1]],  # The second one reaches into padding.
        [[5, 7], [3, 3], [-1, -1]],  # Nothing of these is there.
    ]
)
REAL = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
LABELS = torch.tensor([[0, 1, 1], [1, 0, 1], [1, 0, 1]])


def test_entity_equations():
    head, hidden = head_of(EntityHead), states()
    output = fill(head, hidden, {"labels": LABELS}, mask=MASK, entity_spans=SPANS)
    losses = []
    for row, column in itertools.product(range(3), range(3)):
        if not REAL[row, column]:
            assert output.logits[row, column] == MASKED
            continue
        start, end = SPANS[row, column].tolist()
        tokens = hidden[row, start : min(end, LENGTHS[row])]
        scores = torch.stack([token @ hidden[row, 0] for token in tokens]) / HIDDEN**0.5
        entity = sum(p * token for p, token in zip(scores.softmax(0), tokens, strict=True))
        logit = head.classifier(gelu(head.proj(entity)))[0]
        torch.testing.assert_close(output.logits[row, column], logit)
        losses.append(-(logit if LABELS[row, column] else -logit).sigmoid().log())
    torch.testing.assert_close(output.loss, sum(losses) / REAL.sum())


def test_entities_order_and_padding():
    head, hidden = head_of(EntityHead), states()
    output = fill(head, hidden, {"labels": LABELS}, mask=MASK, entity_spans=SPANS)
    more = torch.cat([torch.full((3, 2, 2), -1), SPANS.flip(1)], 1)
    labels = torch.cat([torch.full((3, 2), -100), LABELS.flip(1)], 1)
    again = fill(head, hidden, {"labels": labels}, mask=MASK, entity_spans=more)
    torch.testing.assert_close(again.logits[:, 2:], output.logits.flip(1))
    torch.testing.assert_close(again.loss, output.loss)
    none = fill(head, hidden, {"labels": LABELS}, entity_spans=torch.full((3, 3, 2), -1))
    assert none.loss == 0 and (none.logits == MASKED).all()
    shifted = fill(head, hidden, mask=MASK, entity_spans=SPANS[:1].expand(3, -1, -1) + 1)
    assert (shifted.logits[0] - output.logits[0]).abs().max() > 0.1


def test_entity_dropout():
    head, hidden = head_of(EntityHead, cls_dropout=0.5).train(), states()
    one, two = (fill(head, hidden, entity_spans=SPANS).logits for _ in range(2))
    assert not torch.equal(one, two)


# All of them

SPAN_TARGETS = {
    "start_positions": torch.tensor([3, 2, 0]),
    "end_positions": torch.tensor([5, 4, 0]),
}
EVERY = {
    "linear": (SpanHead, SPAN_TARGETS, {}),
    "beam": (BeamSpanHead, SPAN_TARGETS, {"token_type_ids": TYPES}),
    "beam-given": (BeamSpanHead, SPAN_TARGETS, {"answer_mask": (GIVEN + TYPES) > 0}),
    "entity": (EntityHead, {"labels": LABELS}, {"entity_spans": SPANS}),
}


@pytest.mark.parametrize("name", EVERY)
def test_gradients(name):
    kind, targets, inputs = EVERY[name]
    head = head_of(kind)
    hidden = states().requires_grad_()
    parameters = dict(head.named_parameters())

    def loss(x, *values):
        with torch.nn.utils.stateless._reparametrize_module(
            head, dict(zip(parameters, values, strict=True))
        ):
            return fill(head, x, targets, mask=MASK, **inputs).loss

    assert torch.autograd.gradcheck(loss, (hidden, *parameters.values()), fast_mode=True)
    loss(hidden, *parameters.values()).backward()
    # A softmax does not feel the bias of its logits.
    assert all(p.grad.any() for name, p in parameters.items() if name.endswith("weight"))
    assert hidden.grad[MASK].any() and not hidden.grad[~MASK].any()


@pytest.mark.parametrize("max_seqlen", [None, 7, 9])
@pytest.mark.parametrize("name", EVERY)
def test_packed_equals_padded(name, max_seqlen):
    kind, targets, inputs = EVERY[name]
    head, hidden = head_of(kind), states()
    expected = fill(head, hidden, targets, mask=MASK, **inputs)
    rows, cu_seqlens = packed(hidden)
    tokens = {n: x if n == "entity_spans" else x[MASK] for n, x in inputs.items()}
    got = fill(head, rows, targets, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **tokens)
    torch.testing.assert_close(got.loss, expected.loss)
    for field in ("logits", "start_logits", "end_logits"):
        mine, theirs = getattr(got, field), getattr(expected, field)
        if theirs is not None:
            torch.testing.assert_close(mine[:, : theirs.size(1)], theirs)
            assert (mine[:, theirs.size(1) :] == MASKED).all()
            assert name == "entity" or mine.size(1) == (max_seqlen or max(LENGTHS))
    if expected.beam is not None:
        found = expected.beam.start_log_probs > -1000
        width = found.size(1)
        for field in ("start_index", "start_log_probs"):
            mine, theirs = getattr(got.beam, field), getattr(expected.beam, field)
            torch.testing.assert_close(mine[:, :width][found], theirs[found])


MODELS = {
    "linear": ("span", {}, SPAN_TARGETS),
    "beam": ("span", {"span_head": "beam", "span_beam_size": 3}, SPAN_TARGETS),
    "entity": ("entity", {}, {"labels": LABELS, "entity_spans": SPANS}),
}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("linear", "electra"),
        ("beam", "electra"),
        ("beam", "deberta-v2"),
        ("entity", "deberta-v2"),
    ],
)
def test_models_learn(name, family):
    """A few steps on three sequences; what counts goes through Model.forward."""
    head, changes, targets = MODELS[name]
    torch.manual_seed(0)
    model = Model(tiny.config(family, **changes), head)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    inputs = {"input_ids": tiny.token_ids(3, LENGTH), "attention_mask": MASK.long()}
    losses = []
    for _ in range(25):
        loss = model(**inputs, **targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    model.eval()
    output = model(**inputs, **{k: v for k, v in targets.items() if k == "entity_spans"})
    if name == "entity":
        assert ((output.logits > 0).long()[REAL] == LABELS[REAL]).all()
    elif name == "linear":
        assert torch.equal(output.start_logits.argmax(1), targets["start_positions"])
        assert torch.equal(output.end_logits.argmax(1), targets["end_positions"])
    else:
        assert torch.equal(output.beam.start_index[:, 0], targets["start_positions"])
        assert torch.equal(output.beam.end_index[:, 0, 0], targets["end_positions"])
        assert (output.impossible_logits > 0).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("name", "train"), [("linear", True), ("beam", True), ("beam", False), ("entity", True)]
)
def test_compiles_without_graph_breaks(name, train):
    head, changes, targets = MODELS[name]
    model = tiny.randomize(
        Model(tiny.config("electra", num_hidden_layers=1, **changes), head)
    ).train(train)
    inputs = {
        "input_ids": tiny.token_ids(3, LENGTH),
        "attention_mask": MASK.long(),
        "token_type_ids": TYPES,
        **targets,
    }
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, expected = compiled(**inputs), model(**inputs)
    torch.testing.assert_close(got.loss, expected.loss)
    if name == "beam":
        assert (got.beam is None) == (expected.beam is None) == train
    if not train and name == "beam":
        # What follows a start that may not be one hangs on the states of padding.
        found = expected.beam.start_log_probs > -1000
        assert found.sum() == 8
        assert torch.equal(got.beam.start_index[found], expected.beam.start_index[found])
        assert torch.equal(got.beam.end_index[found], expected.beam.end_index[found])
    gradients = []
    for output in (got, expected):
        model.zero_grad()
        output.loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_model_passes_its_arguments_on():
    model = tiny.randomize(Model(tiny.config("electra", span_head="beam"), "span"))
    ids = tiny.token_ids(3, LENGTH)

    def allowed(**inputs):
        return model(ids, **inputs).start_logits > MASKED

    assert torch.equal(allowed(), ALLOWED["all"])
    assert torch.equal(allowed(attention_mask=MASK), ALLOWED["mask"])
    assert torch.equal(allowed(attention_mask=MASK, token_type_ids=TYPES), ALLOWED["types"])
    assert torch.equal(allowed(attention_mask=MASK, answer_mask=GIVEN), ALLOWED["given"])
    rows, cu_seqlens = packed(ids)
    ours = model(rows, cu_seqlens=cu_seqlens, max_seqlen=7, answer_mask=GIVEN[MASK]).start_logits
    assert torch.equal(ours > MASKED, ALLOWED["given"])
    assert model.head.end_dense.out_features == 512 and model.head.beam_size == 20


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda: fill(head_of(BeamSpanHead), states(), answer_mask=GIVEN[:, 1:]),
            r"answer_mask must have one value a token, \[3, 7\], got \[3, 6\]",
        ),
        (
            lambda: fill(head_of(EntityHead), states()),
            r"entity_spans must be \[B, E, 2\].*got none",
        ),
        (
            lambda: fill(head_of(EntityHead), states(), entity_spans=SPANS[:2]),
            r"with B = 3 for an entity head, got \[2, 3, 2\]",
        ),
        (
            lambda: fill(head_of(EntityHead), states(), entity_spans=SPANS[..., 0]),
            r"got \[3, 3\]",
        ),
        (lambda: Config(span_beam_size=0), "span_beam_size must be at least 1, got 0"),
        (lambda: Config(span_hidden_size=0), "span_hidden_size must be at least 1, got 0"),
        (lambda: Config(span_head="nope"), "span_head must be one of linear, beam; got 'nope'"),
    ],
)
def test_errors(function, message):
    with pytest.raises(ValueError, match=message):
        function()


@pytest.mark.parametrize("kind", [BeamSpanHead, EntityHead])
def test_padding_on_the_left(kind):
    """The first token is the sequence's own, wherever its row begins."""
    head, hidden = head_of(kind), states()
    mask = torch.ones(3, 5)
    spans = torch.tensor([[[1, 3], [2, 5]]] * 3)
    expected = fill(head, hidden[:, :5], mask=mask, entity_spans=spans)
    moved = torch.cat([hidden[:, 5:], hidden[:, :5]], 1)
    mask = torch.nn.functional.pad(mask, (2, 0))
    got = fill(head, moved, mask=mask, entity_spans=spans + 2)
    if kind is EntityHead:
        torch.testing.assert_close(got.logits, expected.logits)
        return
    torch.testing.assert_close(got.impossible_logits, expected.impossible_logits)
    torch.testing.assert_close(got.start_logits[:, 2:], expected.start_logits)
    assert torch.equal(got.beam.start_index[:, :5] - 2, expected.beam.start_index)
