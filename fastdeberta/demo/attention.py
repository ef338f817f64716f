"""The demo's first part: our attention in a transformers model, compared and timed."""

from typing import Any

import torch

from ..integrations.transformers import accelerate, restore
from ..timing import interleaved

LENGTHS = (64, 128, 256, 512)


def compare(seconds: float) -> list[dict[str, float]]:
    """A DeBERTa-v3-base-shaped transformers model (two layers, random weights), eager and ours.

    Each row: length; difference (largest, between hidden states); milliseconds of one layer's
    attention, forward and forward + backward, for both.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    # Fields of every released checkpoint that DebertaV2Config takes without declaring them.
    undeclared: dict[str, Any] = {
        "position_buckets": 256,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    }
    config = DebertaV2Config(
        vocab_size=1000,
        hidden_size=768,
        num_hidden_layers=2,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        **undeclared,
    )
    model = DebertaV2Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query_proj" in name or "key_proj" in name:
                parameter.mul_(4)  # At initialisation scores are too small to matter.
    return [_row(model, length, seconds / len(LENGTHS)) for length in LENGTHS]


def _row(model: Any, length: int, seconds: float) -> dict[str, float]:
    ids = torch.randint(1, model.config.vocab_size, (1, length))
    mask = torch.ones_like(ids)
    mask[:, length - length // 8 :] = 0
    with torch.no_grad():
        eager = model(ids, attention_mask=mask).last_hidden_state
        ours = accelerate(model)(ids, attention_mask=mask).last_hidden_state
    real = mask.bool()

    encoder = model.encoder
    hidden = model.embeddings(ids).detach()
    table = encoder.get_rel_embedding().detach()
    fast = encoder.layer[0].attention.self
    rule = encoder.get_rel_pos(hidden)
    restore(model)
    slow = encoder.layer[0].attention.self
    pairs = encoder.get_attention_mask(mask)
    distances = encoder.get_rel_pos(hidden)

    def eager_attention(x: torch.Tensor) -> torch.Tensor:
        return slow(x, pairs, relative_pos=distances, rel_embeddings=table)[0]

    def our_attention(x: torch.Tensor) -> torch.Tensor:
        return fast(x, mask, relative_pos=rule, rel_embeddings=table)[0]

    def forward(attention: Any) -> None:
        with torch.no_grad():
            attention(hidden)

    def full(attention: Any) -> None:
        attention(hidden.requires_grad_()).sum().backward()

    times = interleaved(
        {
            "eager_forward": lambda: forward(eager_attention),
            "ours_forward": lambda: forward(our_attention),
            "eager_full": lambda: full(eager_attention),
            "ours_full": lambda: full(our_attention),
        },
        seconds,
    )
    return {"length": length, "difference": float((eager - ours)[real].abs().max()), **times}
