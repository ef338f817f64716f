"""Text generation: prompts -> continuations, greedy or sampled, one token at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cache import KeyValueCache
from ..packing import Packing
from .heads import CausalLMHead

if TYPE_CHECKING:
    from .model import Model


def generate(
    model: "Model",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continues prompts with a causal model, greedily or by sampling.

    Runs in eval mode without gradients, whatever mode the model is in, and leaves that as it was.
    What one sequence becomes does not depend on the others, but for the random numbers it draws.

    Args:
        model: has the head "causal".
        input_ids: int64 [B, L], the prompts.
        attention_mask: [B, L], nonzero = a token. Prompts may be padded on either side: tokens of
            zero mask are left out, as though the prompt had been written without them.
        max_new_tokens: at most so many tokens are added.
        do_sample: draw each token from the model's distribution; otherwise take the likeliest.
        temperature: divides the logits before sampling; 0 takes the likeliest.
        top_k: sample among the k likeliest tokens; 0: among all.
        top_p: sample among the fewest likeliest tokens that together have this probability, after
            temperature and top_k.
        eos_token_id: stop tokens: a sequence ends with the first of them, which is kept.
        pad_token_id: what follows the end of a sequence; None: the config's.
        generator: where random numbers come from, on the model's device; None: torch's own.
        use_cache: keep keys and values, so that a step costs one token's work; otherwise every step
            reads everything again.

    Returns:
        int64 [B, L + n]: input_ids as given, then the new tokens; n <= max_new_tokens, fewer when
        every sequence ended before.

    Raises:
        ValueError, TypeError: another head, or an argument that does not fit; the message names it.

    Source: nucleus sampling (top_p): Holtzman et al. 2020, section 3.1; names and order of the
    settings: transformers' generate.
    """
    _check_prompts(model, input_ids, attention_mask)
    _check_sampling(do_sample, temperature, top_k, top_p)
    vocab = model.config.vocab_size
    stop = [] if eos_token_id is None else eos_token_id
    stop = list(stop) if isinstance(stop, Sequence) else [stop]
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    for name, ids in (("eos_token_id", stop), ("pad_token_id", [pad])):
        if not all(isinstance(i, int) and 0 <= i < vocab for i in ids):
            raise ValueError(f"{name} must hold ids in [0, vocab_size = {vocab}), got {ids}")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {max_new_tokens}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator is not None and generator.device.type != input_ids.device.type:
        raise ValueError(
            f"generator must be on input_ids' device {input_ids.device}, got {generator.device}"
        )
    prompts, mask = _aligned(input_ids, attention_mask)
    _check_room(model, prompts.size(1), max_new_tokens)

    ends = torch.tensor(stop, dtype=torch.long, device=input_ids.device)
    running = torch.ones_like(input_ids[:, 0], dtype=torch.bool)
    new = input_ids.new_full((len(input_ids), max_new_tokens), pad)
    count = 0
    with torch.no_grad(), _evaluating(model):
        read: Callable[[Tensor], Tensor] = Rereader(model, mask)
        if use_cache:
            read = CachedReader(model, mask, prompts.shape, prompts.size(1) + max_new_tokens - 1)
        tokens = prompts
        while count < max_new_tokens and (not stop or running.any()):
            logits = read(tokens)
            if do_sample and temperature > 0:
                chosen = sample(logits, temperature, top_k, top_p, generator)
            else:
                chosen = logits.argmax(-1)
            new[:, count] = torch.where(running, chosen, pad)
            running &= torch.isin(chosen, ends, invert=True)
            tokens = new[:, count : count + 1]
            count += 1
    return torch.cat([input_ids, new[:, :count]], 1)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row: logits [B, vocab] -> int64 [B]. temperature > 0; the others: `generate`."""
    order = None
    if 0 < top_k < logits.size(-1):
        logits, order = logits.topk(top_k)
    elif top_p < 1:
        logits, order = logits.sort(descending=True)
    logits = logits.float()
    # Differences to the largest, and no divisor below what float32 holds: nothing becomes NaN.
    logits = logits - logits.amax(-1, keepdim=True)
    probs = (logits / max(temperature, torch.finfo(torch.float32).tiny)).softmax(-1)
    if top_p < 1:
        likelier = probs.cumsum(-1) - probs
        probs = probs.masked_fill(likelier >= top_p, 0)
    drawn = torch.multinomial(probs, 1, generator=generator)
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)


class CachedReader:
    """Reads prompts, then one token of every sequence at a time, each token once.

    Args:
        mask: bool [B, L], of prompts that all end at L; None: no prompt is padded.
        shape: (B, L). capacity: tokens of a sequence at the end.
    """

    def __init__(self, model: "Model", mask: Tensor | None, shape: Sequence[int], capacity: int):
        batch, length = shape
        self.model, self.mask, self.capacity = model, mask, capacity
        self.distances: Tensor | None = None
        self.encoder = model.backbone.encoder
        self.packing = Packing.of(mask) if model.backbone.unpad else None
        tokens = None
        if self.packing is not None:
            tokens = (self.packing.kept // length, self.packing.kept % length)
        self.caches = [KeyValueCache(batch, capacity, length, tokens) for _ in self.encoder.layer]

    def __call__(self, tokens: Tensor) -> Tensor:
        """The prompts [B, L], then [B, 1] at a time -> logits of the next token, [B, vocab]."""
        return self._step(tokens) if self.caches[0].length else self._start(tokens)

    def _start(self, tokens: Tensor) -> Tensor:
        positions = _positions(self.mask, tokens)
        self.next_position = positions[:, -1:] + 1
        rule, length, capacity = self.encoder.relative_position, tokens.size(1), self.capacity
        if rule is not None:  # From a sequence's last token to all; on the CPU, as all logarithms.
            distance = torch.arange(capacity - 1, -1, -1)
            self.distances = rule.bucket(distance)[None].to(tokens.device)
        mask, cu_seqlens, max_seqlen = self.mask, None, None
        if self.mask is not None:
            self.mask = nn.functional.pad(self.mask, (0, capacity - length), value=True)
        if self.packing is not None:
            tokens, positions = self.packing.pack(tokens), self.packing.pack(positions)
            mask, cu_seqlens = self.packing.key_mask, self.packing.cu_seqlens
            max_seqlen = self.packing.max_seqlen
        x = self.model.backbone.embeddings(tokens, None, positions, mask, None)
        x = self._layers(x, **self.encoder.attention_arguments(mask, cu_seqlens, max_seqlen, True))
        return _logits(self.model, x[:, -1] if cu_seqlens is None else x[cu_seqlens[1:].long() - 1])

    def _step(self, tokens: Tensor) -> Tensor:
        length = self.caches[0].length + 1
        x = self.model.backbone.embeddings(tokens, None, self.next_position, None, None)
        x = self._layers(
            x,
            attention_mask=None if self.mask is None else self.mask[:, :length],
            relative_pos=None if self.distances is None else self.distances[:, -length:],
        )
        self.next_position = self.next_position + 1
        return _logits(self.model, x[:, -1])

    def _layers(self, x: Tensor, **attention: Any) -> Tensor:
        for layer, cache in zip(self.encoder.layer, self.caches, strict=True):
            x, _ = layer(x, cache=cache, **attention)
        return x


class Rereader:
    """What CachedReader does, reading all tokens again for every new one."""

    def __init__(self, model: "Model", mask: Tensor | None):
        self.model, self.mask = model, mask
        self.tokens: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """The prompts [B, L], then [B, 1] at a time -> logits of the next token, [B, vocab]."""
        if self.tokens is not None:
            tokens = torch.cat([self.tokens, tokens], 1)
            if self.mask is not None:
                self.mask = nn.functional.pad(self.mask, (0, 1), value=True)
        self.tokens = tokens
        positions = _positions(self.mask, tokens)
        states = self.model.backbone(tokens, self.mask, position_ids=positions, causal=True)
        return _logits(self.model, states[-1][:, -1])


def _logits(model: "Model", hidden: Tensor) -> Tensor:
    assert isinstance(model.head, CausalLMHead)
    return model.head(hidden, model.backbone.embeddings.word_embeddings.weight)


def _positions(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Each token's position in its own sequence, int64 [B, L] for tokens [B, L]."""
    mask = torch.ones_like(tokens) if mask is None else mask
    return (mask.cumsum(1) - 1).clamp(min=0)


def _aligned(input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Prompts that end at the last column, without gaps; and bool, True = a token, or None."""
    if mask is None or mask.bool().all():
        return input_ids, None
    valid = mask.bool()
    length = int(valid.sum(1).max())
    # A stable sort keeps the tokens' order.
    order = valid.long().argsort(dim=1, stable=True)[:, -length:]
    valid = valid.gather(1, order)
    return input_ids.gather(1, order), None if valid.all() else valid


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_prompts(model: "Model", input_ids: Tensor, mask: Tensor | None) -> None:
    if not isinstance(model.head, CausalLMHead):
        raise ValueError(f"head must be 'causal' to generate text, got {model.head_name!r}")
    if model.backbone.encoder.conv is not None:
        raise ValueError("conv_kernel_size must be 0 to generate text: a convolution sees ahead")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be [B, L] and not empty, got {list(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64, got {input_ids.dtype}")
    low, high = torch.aminmax(input_ids)
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"input_ids must be in [0, vocab_size = {model.config.vocab_size}), "
            f"got {int(low)} to {int(high)}"
        )
    if mask is None:
        return
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have input_ids' shape {list(input_ids.shape)}, "
            f"got {list(mask.shape)}"
        )
    empty = (~mask.bool().any(1)).nonzero()
    if len(empty):
        raise ValueError(
            f"attention_mask must leave a token in every row, got none in row {int(empty[0])}"
        )


def _check_room(model: "Model", prompt: int, new: int) -> None:
    limit = model.config.max_position_embeddings
    if model.backbone.embeddings.position_biased_input and prompt + new > limit:
        raise ValueError(
            f"max_new_tokens: prompt and new tokens together may be max_position_embeddings = "
            f"{limit}, got {prompt} and {new}"
        )


def _check_sampling(do_sample: bool, temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k must be an integer of at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    given = {"temperature": temperature not in (0, 1), "top_k": top_k > 0, "top_p": top_p < 1}
    for name, changed in given.items():
        if changed and not do_sample:
            raise ValueError(
                f"{name} needs do_sample=True: without it the likeliest token is taken"
            )
