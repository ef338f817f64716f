"""Tokenizers: training, files, special tokens. All are tokenizers.Tokenizer objects."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

from .files import write_atomically

PAD, CLS, SEP, UNK, MASK = SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
FILE = "tokenizer.json"


def train(documents: Iterable[str], vocab_size: int, lowercase: bool = False):
    """Trains a SentencePiece unigram tokenizer, the kind of DeBERTa v2 and v3.

    Special tokens get ids 0 to 4: [PAD] [CLS] [SEP] [UNK] [MASK]. The same documents give the
    same tokenizer. A small text may yield fewer than vocab_size tokens.

    Returns:
        tokenizers.Tokenizer, which frames pairs as [CLS] A [SEP] B [SEP].
    """
    import sentencepiece
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if vocab_size < 100:
        raise ValueError(f"vocab_size must be at least 100, got {vocab_size}")
    steps = [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    normalizer = normalizers.Sequence(steps + ([normalizers.Lowercase()] if lowercase else []))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(normalizer.normalize_str(text) for text in documents),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        seed_sentencepiece_size=20 * vocab_size,
        normalization_rule_name="identity",
        max_sentence_length=1 << 20,
        num_threads=2,  # The result depends on it.
        minloglevel=2,
        pad_id=0,
        pad_piece=PAD,
        bos_id=1,
        bos_piece=CLS,
        eos_id=2,
        eos_piece=SEP,
        unk_id=3,
        unk_piece=UNK,
        user_defined_symbols=[MASK],
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=pieces.unk_id()))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    frame(tokenizer)
    return tokenizer


def frame(tokenizer) -> None:
    """Makes a tokenizer put [CLS] and [SEP] around texts and pairs."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(t, special_id(tokenizer, t)) for t in (CLS, SEP)],
    )


def load(path: str | Path):
    """A tokenizers.Tokenizer from a tokenizer.json, or from a directory that holds one.

    Raises:
        FileNotFoundError: no such file. ValueError: not a tokenizer, or it lacks a special token.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    for token in SPECIAL_TOKENS:
        special_id(tokenizer, token)
    return tokenizer


def save(tokenizer, directory: str | Path) -> None:
    """Writes tokenizer.json, and tokenizer_config.json so that transformers loads it too."""
    names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(names, SPECIAL_TOKENS, strict=True)),
    }
    write_atomically(Path(directory) / FILE, tokenizer.to_str(pretty=True))
    write_atomically(Path(directory) / "tokenizer_config.json", json.dumps(config, indent=2))


def special_id(tokenizer, token: str) -> int:
    """The id of a special token that the tokenizer must have."""
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ValueError(f"the tokenizer has no {token} token")
    return index
