"""The names that checkpoints use: THE table of conversion.

HEADS, BACKBONE and INNER pair our parameter names with transformers'; everything that is saved
goes through them, and so does what is loaded. Files of other makers are first brought to
transformers' names: OLD for Microsoft's and older PyTorch files, TENSORFLOW for Google's.

To add a head: its rows in HEADS (the first prefix that fits renames, so longer ones stand first),
its transformers class, if there is one, in ARCHITECTURES, and its prefix in OTHER_HEADS.
"""

import re
from collections.abc import Iterable
from typing import Any

from .config import Config

Rows = list[tuple[str, str]]

_LM_PREDICTIONS: Rows = [("head.", "lm_predictions.lm_head.")]
_CLS_PREDICTIONS: Rows = [
    ("head.dense.", "cls.predictions.transform.dense."),
    ("head.LayerNorm.", "cls.predictions.transform.LayerNorm."),
    ("head.bias", "cls.predictions.bias"),
]
_CLASSIFIER: Rows = [("head.classifier.", "classifier.")]
_POOLED: Rows = [("head.pooler.", "pooler."), *_CLASSIFIER]
_SPAN: Rows = [("head.classifier.", "qa_outputs.")]
_BEAM: Rows = [("head.", "qa_outputs.")]
_ENTITY: Rows = [("head.proj.", "proj."), *_CLASSIFIER]

_DEBERTA: dict[str, Rows] = {
    "base": [],
    "mlm": _LM_PREDICTIONS,
    "mlm, legacy": _CLS_PREDICTIONS,
    "rtd": [("head.", "mask_predictions.")],
    "causal": _LM_PREDICTIONS,
    "causal, legacy": _CLS_PREDICTIONS,
    "sequence": _POOLED,
    "sequence, linear": _CLASSIFIER,
    "token": _CLASSIFIER,
    "span": _SPAN,
    "span, beam": _BEAM,
    "choice": _POOLED,
    "entity": _ENTITY,
}
_GENERATOR: Rows = [("head.bias", "generator_lm_head.bias"), ("head.", "generator_predictions.")]

# Family -> head, or head and variant (see `variant`) -> our prefix, theirs.
HEADS: dict[str, dict[str, Rows]] = {
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA,
    "electra": {
        "base": [],
        "mlm": _GENERATOR,
        "rtd": [
            ("head.classifier.", "discriminator_predictions.dense_prediction."),
            ("head.", "discriminator_predictions."),
        ],
        "causal": _GENERATOR,
        "sequence": [("head.", "classifier.")],
        "sequence, linear": _CLASSIFIER,
        "token": _CLASSIFIER,
        "span": _SPAN,
        "span, beam": _BEAM,
        "choice": [("head.summary.", "sequence_summary.summary."), *_CLASSIFIER],
        "entity": _ENTITY,
    },
}

# Family -> our prefix, theirs; the last row is the family's own prefix.
BACKBONE: dict[str, Rows] = {
    "deberta": [("backbone.", "deberta.")],
    "deberta-v2": [("backbone.", "deberta.")],
    "electra": [
        ("backbone.embeddings.embed_proj.", "electra.embeddings_project."),
        ("backbone.", "electra."),
    ],
}

# Family -> names inside a layer that differ, wherever they stand.
INNER: dict[str, Rows] = {
    "deberta": [],
    "deberta-v2": [],
    "electra": [
        (".self.query_proj.", ".self.query."),
        (".self.key_proj.", ".self.key."),
        (".self.value_proj.", ".self.value."),
    ],
}

# Family -> head or variant -> transformers' class, where it has one.
ARCHITECTURES: dict[str, dict[str, str]] = {
    "deberta": {
        "base": "DebertaModel",
        "mlm": "DebertaForMaskedLM",
        "mlm, legacy": "DebertaForMaskedLM",
        "sequence": "DebertaForSequenceClassification",
        "token": "DebertaForTokenClassification",
        "span": "DebertaForQuestionAnswering",
    },
    "deberta-v2": {
        "base": "DebertaV2Model",
        "mlm": "DebertaV2ForMaskedLM",
        "mlm, legacy": "DebertaV2ForMaskedLM",
        "sequence": "DebertaV2ForSequenceClassification",
        "token": "DebertaV2ForTokenClassification",
        "span": "DebertaV2ForQuestionAnswering",
        "choice": "DebertaV2ForMultipleChoice",
    },
    "electra": {
        "base": "ElectraModel",
        "mlm": "ElectraForMaskedLM",
        "rtd": "ElectraForPreTraining",
        "causal": "ElectraForCausalLM",
        "sequence": "ElectraForSequenceClassification",
        "token": "ElectraForTokenClassification",
        "span": "ElectraForQuestionAnswering",
        "choice": "ElectraForMultipleChoice",
    },
}

# What a file may hold beside one model's parameters; it is left out, and reported as such.
OTHER_HEADS = (
    "cls.",
    "lm_predictions.",
    "mask_predictions.",
    "generator_predictions.",
    "generator_lm_head.",
    "discriminator_predictions.",
    "pooler.",
    "proj.",
    "classifier.",
    "qa_outputs.",
    "sequence_summary.",
    "task_specific.",
    "bert.",
)
# What may stand between the encoder and `classifier.`: a classifier that was trained behind one
# of these is not one for a head without it, whatever its shape.
BEFORE_CLASSIFIER = ("pooler.", "proj.", "sequence_summary.")

# Position numbers, the mask decoder's positions where there is no decoder, GDES differences,
# BERT's pooler, and what TensorFlow's optimiser keeps.
NO_PARAMETERS = re.compile(
    r"\.position_ids$|\.embeddings\.position_embeddings\.weight$|\.embeddings\.\w+\._weight$"
    r"|^electra\.pooler\.|\.adam_[mv]$|^global_step$"
)

# Names of older PyTorch files -> transformers' of today; every row that fits applies.
# {prefix}: the family's. A bare backbone's file has none, the oldest ones have BERT's.
OLD: Rows = [
    (r"^(bert\.|(?=embeddings\.|encoder\.|embeddings_project\.))", "{prefix}"),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"^mask_predictions\.classifer\.", "mask_predictions.classifier."),
]

# A tied duplicate -> the parameter that it stands for where a file holds no other copy.
TIED: Rows = [
    ("cls.predictions.decoder.weight", "{prefix}embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("generator_lm_head.weight", "{prefix}embeddings.word_embeddings.weight"),
]

# Names of Google's ELECTRA -> transformers'; every row that fits applies. Kernels are transposed.
TENSORFLOW: Rows = [
    (r"/", "."),
    (r"\.layer_(\d+)\.", r".layer.\1."),
    (r"\.(kernel|gamma)$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.(word|position|token_type)_embeddings$", r".\1_embeddings.weight"),
    (r"^discriminator_predictions\.dense_1\.", "discriminator_predictions.dense_prediction."),
    (r"^generator_predictions\.output_bias$", "generator_lm_head.bias"),
    (r"^task_specific\.\w+\.dense\.(weight|bias)$", r"classifier.\1"),
]
# The same dense layers in a checkpoint with `qa_hidden`: these rows first.
TENSORFLOW_SPAN: Rows = [
    (r"^task_specific/\w+/dense/", "qa_outputs/start/"),
    (r"^task_specific/\w+/qa_hidden/", "qa_outputs/end_dense/"),
    (r"^task_specific/\w+/dense_1/", "qa_outputs/end/"),
    (r"^task_specific/\w+/dense_2/", "qa_outputs/impossible_dense/"),
    (r"^task_specific/\w+/dense_3/", "qa_outputs/impossible/"),
]

# The family of a file whose config names none: of the first row that fits one of its names.
FAMILIES: Rows = [
    (r"\.self\.in_proj\.", "deberta"),
    (r"\.self\.query_proj\.", "deberta-v2"),
    (r"^electra[./]", "electra"),
    (r"^embeddings_project\.", "electra"),
    (r"^bert\.", "bert"),
]

# A BERT encoder is an ELECTRA encoder; what BERT's config.json may leave out.
BERT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}

# Fields of Microsoft's own configs (a dot: inside an object) -> ours.
MICROSOFT_FIELDS: Rows = [
    ("padding_idx", "pad_token_id"),
    ("pooling.dropout", "pooler_dropout"),
    ("pooling.hidden_act", "pooler_hidden_act"),
]

# Microsoft's newer code saves a v1 model in v2's arrangement: its fused projection taken apart.
REARRANGED_V1: dict[str, Any] = {
    "model_type": "deberta-v2",
    "position_buckets": -1,
    "share_att_key": False,
    "norm_rel_ebd": "none",
}


def variant(config: Config, head: str) -> str:
    """The key of HEADS: a head, or a head and the kind of it that the config asks for."""
    kinds = {
        "mlm": "legacy" if config.legacy else "",
        "causal": "legacy" if config.legacy else "",
        "sequence": config.sequence_head,
        "span": config.span_head,
    }
    key = f"{head}, {kinds.get(head)}"
    return key if key in HEADS[config.model_type] else head


def named_head(config: Config) -> str | None:
    """The head of the class that a checkpoint's config names; None: of none that is known."""
    heads = ARCHITECTURES[config.model_type].items()
    named = config.extra.get("architectures") or []
    return next((key.split(",")[0] for key, name in heads if name in named), None)


def architecture(config: Config, head: str) -> str | None:
    """transformers' class for a model, where it has one."""
    return ARCHITECTURES[config.model_type].get(variant(config, head))


def rows(config: Config, head: str) -> Rows:
    """Our names and transformers' for one model."""
    family = config.model_type
    return [*HEADS[family][variant(config, head)], *BACKBONE[family], *INNER[family]]


def rename(name: str, table: Iterable[tuple[str, str]], back: bool = False) -> str:
    """Ours -> theirs, or back: the first prefix that fits, and every inner name (with a dot)."""
    prefixed = False
    for pair in table:
        old, new = reversed(pair) if back else pair
        if old.startswith("."):
            name = name.replace(old, new)
        elif not prefixed and name.startswith(old):
            name, prefixed = new + name[len(old) :], True
    return name


def prefix(family: str) -> str:
    """What transformers' names of a family's backbone begin with."""
    return BACKBONE[family][-1][1]


def current(name: str, family: str) -> str:
    """Transformers' name of today for what a PyTorch file calls `name`."""
    for pattern, new in OLD:
        name = re.sub(pattern, new.format(prefix=prefix(family)), name)
    return name


def from_tensorflow(name: str, span: bool = False) -> str:
    """Transformers' name for what Google's ELECTRA calls `name`. span: it answers questions."""
    for pattern, new in (*(TENSORFLOW_SPAN if span else []), *TENSORFLOW):
        name = re.sub(pattern, new, name)
    return name


def family_of(names: Iterable[str]) -> str | None:
    """Whose names these are; None where they do not tell."""
    names = list(names)
    for pattern, family in FAMILIES:
        if any(re.search(pattern, name) for name in names):
            return family
    return None
