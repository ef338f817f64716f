"""What generator and discriminator share."""

import torch
from torch import Tensor, nn

from ..models import Model

TIES = ("none", "embeddings", "all", "gdes")

TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


class DeltaEmbedding(nn.Module):
    """GDES: a table that is another's, without gradient, plus a learned difference.

    The difference starts at zero and is named `_weight`, as in microsoft/DeBERTa's checkpoints.

    Source: DeBERTaV3, section 3.3.
    """

    def __init__(self, base: nn.Embedding):
        super().__init__()
        self._base = [base]  # In a list: the table is the generator's parameter, not ours.
        self._weight = nn.Parameter(torch.zeros_like(base.weight))
        self.num_embeddings = base.num_embeddings

    @property
    def weight(self) -> Tensor:
        """The sum, [num_embeddings, size]; gradients reach the difference only."""
        return self._base[0].weight.detach() + self._weight

    def forward(self, ids: Tensor) -> Tensor:
        shared = nn.functional.embedding(ids, self._base[0].weight.detach())
        return shared + nn.functional.embedding(ids, self._weight)


def tie_weights(generator: Model, discriminator: Model, tie: str) -> None:
    """Makes the discriminator use the generator's weights, in place.

    Args:
        tie: "none"; "embeddings", one set of token, position and type tables (and of ELECTRA, as
            in Google's code, the norm that follows them); "all", every weight of the encoder;
            "gdes", the discriminator's tables are the generator's, without gradient, plus a
            difference. Heads are never shared, nor tables that only one network has.

    Raises:
        ValueError: the networks cannot be tied so.

    Source: ELECTRA, section 3.2; DeBERTaV3, section 3.3.
    """
    if tie == "none":
        return
    ours, theirs = generator.backbone, discriminator.backbone
    if tie == "all":
        check_same_size(generator, discriminator, "tie='all'")
        theirs.encoder = ours.encoder
        for name in (*TABLES, "LayerNorm", "embed_proj"):
            part = getattr(ours.embeddings, name)
            if part is not None and getattr(theirs.embeddings, name) is not None:
                setattr(theirs.embeddings, name, part)
        return
    for name in TABLES:
        table, other = getattr(ours.embeddings, name), getattr(theirs.embeddings, name)
        if table is None or other is None:
            continue
        if table.weight.shape != other.weight.shape:
            raise ValueError(
                f"tie={tie!r} needs {name} of one shape: the generator has "
                f"{list(table.weight.shape)}, the discriminator {list(other.weight.shape)}; "
                "give both the discriminator's vocab_size and embedding_size"
            )
        shared = table if tie == "embeddings" else DeltaEmbedding(table)
        setattr(theirs.embeddings, name, shared)
    if tie == "embeddings" and generator.config.model_type == "electra":
        theirs.embeddings.LayerNorm = ours.embeddings.LayerNorm


def check_same_size(generator: Model, discriminator: Model, what: str) -> None:
    """Raises ValueError where an encoder's weight has another shape in the two networks.

    A table that only one of them has (a mask decoder's positions) is no difference.
    """
    ours = {name: list(p.shape) for name, p in generator.backbone.named_parameters()}
    theirs = {name: list(p.shape) for name, p in discriminator.backbone.named_parameters()}
    tables = {f"embeddings.{table}.weight" for table in TABLES}
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        sizes = ours.get(name), theirs.get(name)
        if sizes[0] != sizes[1] and not (name in tables and None in sizes):
            raise ValueError(
                f"{what} needs a generator of the discriminator's size: its {name} is "
                f"{sizes[0]}, the discriminator's {sizes[1]}"
            )


@torch.no_grad()
def copy_encoder(generator: Model, discriminator: Model) -> None:
    """The discriminator's encoder becomes the generator's; differences of GDES become zero.

    A head of the same kind is copied too. Source: ELECTRA, section 3.3 (two-stage training).
    """
    ours = dict(generator.named_parameters())
    same_head = generator.head_name == discriminator.head_name
    for name, parameter in discriminator.named_parameters():
        if name.endswith("._weight"):
            parameter.zero_()
        elif name in ours and (same_head or name.startswith("backbone.")):
            parameter.copy_(ours[name])


def untied(model: Model) -> Model:
    """A copy of a network on its own, GDES tables folded into one."""
    copy = Model(model.config, model.head_name)
    state = dict(model.state_dict())
    for name in TABLES:
        part = getattr(model.backbone.embeddings, name)
        if isinstance(part, DeltaEmbedding):
            prefix = f"backbone.embeddings.{name}."
            state.pop(prefix + "_weight")
            state[prefix + "weight"] = part.weight.detach()
    copy.load_state_dict(state)
    return copy
