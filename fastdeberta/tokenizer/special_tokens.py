"""The special tokens, and the frame that they put around texts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, CLS, SEP, UNK, MASK = SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")


def special_id(tokenizer: "Tokenizer", token: str) -> int:
    """The id of a special token that the tokenizer must have (ValueError: it does not)."""
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ValueError(f"the tokenizer has no {token} token")
    return index


def mark_special_tokens(tokenizer: "Tokenizer", mask_takes_space: bool = False) -> None:
    """Makes the special tokens of the vocabulary be found in text as a whole.

    Args:
        mask_takes_space: [MASK] takes the space before it with it. In a byte-level BPE that space
            is part of the word that [MASK] stands for.

    Raises:
        ValueError: a special token is not in the vocabulary.
    """
    from tokenizers import AddedToken

    for token in SPECIAL_TOKENS:
        special_id(tokenizer, token)
        lstrip = mask_takes_space and token == MASK
        tokenizer.add_special_tokens([AddedToken(token, lstrip=lstrip, normalized=False)])


def frame(tokenizer: "Tokenizer") -> None:
    """Makes a tokenizer put [CLS] and [SEP] around texts and pairs."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(t, special_id(tokenizer, t)) for t in (CLS, SEP)],
    )
