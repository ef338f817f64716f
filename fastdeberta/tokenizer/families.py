"""The three families, each built from its vocabulary."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .special_tokens import MASK, UNK, frame, mark_special_tokens, special_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer, models
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

# Kinds of piece in a SentencePiece model; the proto's names.
_CONTROL, _USER_DEFINED = 3, 4
_UNIGRAM = 1


def unigram(
    model_proto: bytes,
    *,
    lowercase: bool = False,
    split_by_punct: bool = False,
    add_prefix_space: bool | None = None,
    byte_fallback: bool = False,
) -> "Tokenizer":
    """The tokenizer of DeBERTa v2 and v3, from a SentencePiece unigram model (a spm.model file).

    Ids are those of the pieces in the model. A model without [MASK], as Microsoft's are, gets it
    at the next free id (128000 for v2 and v3). Text is normalised by the rules that the model
    carries, as SentencePiece does it. Offsets are characters of the original text; the first
    token of a word covers the space before it.

    Args:
        lowercase, split_by_punct: as `do_lower_case` and `split_by_punct` of transformers'
            DebertaV2Tokenizer; punctuation is split off before words become pieces.
        add_prefix_space: a text's first word gets a space before it. None: as the model says.
        byte_fallback: a character without a piece becomes the pieces of its bytes, as
            SentencePiece does it where a model has them (v3), in place of [UNK].

    Raises:
        ValueError: not a SentencePiece unigram model, one that keeps extra spaces (no DeBERTa's
        does), or it lacks [PAD], [CLS], [SEP] or [UNK].
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    proto = ModelProto()
    try:
        proto.ParseFromString(model_proto)
    except Exception as error:  # protobuf's own error type, whose module differs by version
        raise ValueError(f"not a SentencePiece model: {error}") from None
    if not proto.pieces:
        raise ValueError("not a SentencePiece model: it has no pieces")
    if proto.trainer_spec.model_type != _UNIGRAM:
        raise ValueError("a SentencePiece model that is not unigram, the kind of DeBERTa v2 and v3")

    spec = proto.normalizer_spec
    if not spec.remove_extra_whitespaces:
        raise ValueError("a SentencePiece model that keeps extra spaces, which DeBERTa's do not")

    vocab = [(piece.piece, piece.score) for piece in proto.pieces]
    ids = {piece: index for index, (piece, _) in enumerate(vocab)}
    if UNK not in ids:
        raise ValueError(f"the tokenizer has no {UNK} token")
    byte_fallback = byte_fallback and proto.trainer_spec.byte_fallback
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=ids[UNK], byte_fallback=byte_fallback))

    steps: list[Normalizer] = [normalizers.Lowercase()] if lowercase else []
    if spec.precompiled_charsmap:
        charsmap = normalizers.Precompiled(spec.precompiled_charsmap)
        if charsmap.normalize_str("e\u0301") == "\u00e9":
            # `Precompiled` drops marks of a letter that has two of them, decomposed (Vietnamese),
            # and whole decomposed Hangul syllables; SentencePiece composes them.
            steps.append(normalizers.NFC())
        steps.append(charsmap)
    steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
    steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    tokenizer.normalizer = normalizers.Sequence(steps)

    if add_prefix_space is None:
        add_prefix_space = spec.add_dummy_prefix
    scheme = "always" if add_prefix_space else "never"
    splits: list[PreTokenizer] = []
    if split_by_punct:
        # What lies between punctuation is a text of its own, whose last space is dropped.
        splits = [pre.Punctuation("isolated"), pre.Split(Regex(r" +\z"), "removed")]
    splits.append(pre.Metaspace(prepend_scheme=scheme))
    tokenizer.pre_tokenizer = pre.Sequence(splits)
    metaspace = decoders.Metaspace(prepend_scheme=scheme)
    fallback = [decoders.ByteFallback(), metaspace, decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(fallback) if byte_fallback else metaspace

    if MASK not in ids:
        tokenizer.add_special_tokens([MASK])
    mark_special_tokens(tokenizer)
    for piece in proto.pieces:
        if piece.type in (_CONTROL, _USER_DEFINED):
            special = piece.type == _CONTROL
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])
    frame(tokenizer)
    return tokenizer


def byte_level_bpe(
    model: "models.BPE", *, lowercase: bool = False, add_prefix_space: bool = False
) -> "Tokenizer":
    """The tokenizer of DeBERTa v1: GPT-2's byte-level BPE with BERT's special tokens.

    Any text has tokens; [UNK] does not occur. Offsets are characters of the original text: tokens
    that share a character share its offsets, and the first token of a word covers the space before
    it. Pairs are [CLS] A [SEP] B [SEP], as in Microsoft's pre-training; transformers 5 frames
    them with two [SEP] in the middle where it builds its DebertaTokenizer from the same files.

    Raises:
        ValueError: the vocabulary lacks a special token.
    """
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    tokenizer = Tokenizer(model)
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    mark_special_tokens(tokenizer, mask_takes_space=True)
    frame(tokenizer)
    return tokenizer


def wordpiece(
    vocab: Mapping[str, int],
    *,
    lowercase: bool = True,
    tokenize_chinese_chars: bool = True,
    strip_accents: bool | None = None,
) -> "Tokenizer":
    """The tokenizer of ELECTRA: BERT's WordPiece.

    Args:
        vocab: id by token; a token that continues a word begins with ##.
        tokenize_chinese_chars: every CJK ideograph is a word.
        strip_accents: None: as `lowercase`.

    Raises:
        ValueError: the vocabulary lacks a special token.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(dict(vocab), unk_token=UNK))
    special_id(tokenizer, UNK)
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=tokenize_chinese_chars,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    mark_special_tokens(tokenizer)
    frame(tokenizer)
    return tokenizer
