"""Training of tokenizers. The same documents give the same tokenizer, in every process."""

import io
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .families import byte_level_bpe, wordpiece
from .special_tokens import CLS, MASK, PAD, SEP, SPECIAL_TOKENS, UNK, frame

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Least vocabularies: BPE needs the special tokens and 256 bytes.
_LEAST = {"unigram": 100, "bpe": len(SPECIAL_TOKENS) + 256, "wordpiece": 100}
# Characters of a word above which WordPiece makes it [UNK].
_LONGEST_WORD = 100
# A pair of tokens that occurs once is not worth a token.
_MIN_FREQUENCY = 2


def train(
    documents: Iterable[str], vocab_size: int, lowercase: bool = False, kind: str = "unigram"
) -> "Tokenizer":
    """Trains a tokenizer.

    Special tokens get ids 0 to 4: [PAD] [CLS] [SEP] [UNK] [MASK]. The same documents give the
    same tokenizer. A small text may yield fewer than vocab_size tokens.

    Args:
        documents: texts, which are read once.
        vocab_size: tokens at most, special ones included.
        lowercase: text is lowercased; for "wordpiece" it also loses its accents, as BERT's does.
        kind: "unigram", SentencePiece as in DeBERTa v2 and v3 (text is normalised by NFKC, runs of
            whitespace are one space); "bpe", byte-level as in DeBERTa v1; "wordpiece", as in
            ELECTRA.

    Returns:
        tokenizers.Tokenizer, which frames pairs as [CLS] A [SEP] B [SEP].

    Raises:
        TypeError: documents is one text. ValueError: unknown kind, vocab_size too small, no text.
    """
    if kind not in _LEAST:
        raise ValueError(f"kind must be one of {', '.join(_LEAST)}, got {kind!r}")
    if vocab_size < _LEAST[kind]:
        raise ValueError(
            f"vocab_size must be at least {_LEAST[kind]}, got {vocab_size} (kind {kind!r})"
        )
    if isinstance(documents, str):
        raise TypeError("documents must be several texts, got one str")
    trained = {"unigram": _unigram, "bpe": _bpe, "wordpiece": _wordpiece}[kind]
    return trained(documents, vocab_size, lowercase)


def _unigram(documents: Iterable[str], vocab_size: int, lowercase: bool) -> "Tokenizer":
    import sentencepiece
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    steps = [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    normalizer = normalizers.Sequence(steps + ([normalizers.Lowercase()] if lowercase else []))
    model = io.BytesIO()
    try:
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
    except RuntimeError as error:
        if "sentences_.empty()" in str(error):
            raise ValueError("documents hold no text") from None
        if "smaller than required_chars" in str(error):
            raise ValueError(
                f"vocab_size is too small for the characters of the documents: {vocab_size}"
            ) from None
        raise
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=pieces.unk_id()))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    frame(tokenizer)
    return tokenizer


def _bpe(documents: Iterable[str], vocab_size: int, lowercase: bool) -> "Tokenizer":
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_nonempty(documents), trainer)
    return byte_level_bpe(tokenizer.model, lowercase=lowercase)


def _nonempty(documents: Iterable[str]) -> Iterable[str]:
    """Passes documents through; at their end, a ValueError if none held any text."""
    empty = True
    for document in documents:
        empty = empty and not document.strip()
        yield document
    if empty:
        raise ValueError("documents hold no text")


def _wordpiece(documents: Iterable[str], vocab_size: int, lowercase: bool) -> "Tokenizer":
    """WordPiece with the vocabulary that byte-pair merges yield, as tokenizers' own trainer.

    That trainer numbers the pieces of the alphabet in the order of a hash table, another one in
    every process, and merges of equal frequency in the order of those numbers. Here the alphabet
    is sorted and given to it as special tokens, which keep their order.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    blank = wordpiece({token: i for i, token in enumerate(SPECIAL_TOKENS)}, lowercase=lowercase)
    words: Counter[str] = Counter()
    for document in documents:
        text = blank.normalizer.normalize_str(document)
        words.update(word for word, _ in blank.pre_tokenizer.pre_tokenize_str(text))
    if not words:
        raise ValueError("documents hold no text")

    # The rarest characters are left out where they would fill the vocabulary.
    frequency: Counter[str] = Counter()
    for word, count in words.items():
        for piece in _characters(word):
            frequency[piece] += count
    by_frequency = sorted(frequency, key=lambda piece: (-frequency[piece], piece))
    alphabet = set(by_frequency[: min(1000, (vocab_size - len(SPECIAL_TOKENS)) // 2)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[*SPECIAL_TOKENS, *sorted(alphabet)],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        (
            f"{word} " * count
            for word, count in words.items()
            if len(word) <= _LONGEST_WORD and alphabet.issuperset(_characters(word))
        ),
        trainer,
    )
    return wordpiece(tokenizer.get_vocab(), lowercase=lowercase)


def _characters(word: str) -> list[str]:
    """The pieces of one character that a word is made of: owl -> o ##w ##l."""
    return [word[0], *(f"##{character}" for character in word[1:])]
