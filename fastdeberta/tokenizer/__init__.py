"""Tokenizers of the three families: SentencePiece unigram (DeBERTa v2, v3), byte-level BPE
(DeBERTa v1) and WordPiece (ELECTRA).

All are `tokenizers.Tokenizer` objects that frame texts as [CLS] A [SEP] and pairs as
[CLS] A [SEP] B [SEP]. `load` reads what a checkpoint comes with, `train` makes one from text,
`save` writes what `load` and transformers read.
"""

from .special_tokens import CLS, MASK, PAD, SEP, SPECIAL_TOKENS, UNK, frame, special_id
from .storage import FILE, load, save
from .training import train

__all__ = [
    "CLS",
    "FILE",
    "MASK",
    "PAD",
    "SEP",
    "SPECIAL_TOKENS",
    "UNK",
    "frame",
    "load",
    "save",
    "special_id",
    "train",
]
