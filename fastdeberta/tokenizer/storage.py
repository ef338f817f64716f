"""Tokenizers as files: those of released checkpoints, and our own."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_lines, write_atomically
from .families import byte_level_bpe, unigram, wordpiece
from .special_tokens import SEP, SPECIAL_TOKENS, frame, special_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# What a directory may hold, the first one found is read.
_VOCABULARIES = (FILE, "spm.model", "spiece.model", "vocab.json", "vocab.txt", "bpe_encoder.bin")


def load(path: str | Path, *, pairs: str = "single", byte_fallback: bool = False) -> "Tokenizer":
    """Loads a tokenizer of any of the three families.

    The options in a tokenizer_config.json beside a vocabulary are followed (do_lower_case,
    split_by_punct, add_prefix_space, tokenize_chinese_chars, strip_accents), and tokens that were
    added later are added (added_tokens_decoder, added_tokens.json). A tokenizer.json holds all of
    this itself. Truncation and padding that it may hold are turned off.

    Args:
        path: a tokenizer.json; a SentencePiece *.model (DeBERTa v2, v3); a vocab.json with
            merges.txt beside it (v1); a vocab.txt (ELECTRA); or a directory, of which the first of
            these is read.
        pairs: what to do with a tokenizer.json that frames pairs as [CLS] A [SEP] [SEP] B [SEP].
            "single", the default, makes it [CLS] A [SEP] B [SEP] and warns: DeBERTa v1 was
            pre-trained so, and fine-tuning here frames pairs so; two [SEP] come from transformers
            5, whose DebertaTokenizer frames as RoBERTa's does. "keep" leaves it, which suits a
            checkpoint that was fine-tuned on pairs with two. Other frames are always left alone.
        byte_fallback: with a SentencePiece model that has pieces for bytes (v3), write a character
            that has no piece as bytes. v3 was pre-trained so; transformers' fast tokenizers give
            [UNK], and so does the default here. A tokenizer.json says itself.

    Raises:
        FileNotFoundError: no such file. ValueError: not a tokenizer, it lacks a special token, or
        it is a pickle (v1's bpe_encoder.bin), which is never read.
    """
    if pairs not in ("single", "keep"):
        raise ValueError(f"pairs must be 'single' or 'keep', got {pairs!r}")
    path = _vocabulary(Path(path))
    if path.suffix == ".bin":
        raise ValueError(
            f"{path} is a pickle, which can run code and is not read: use the checkpoint's "
            f"vocab.json and merges.txt, or a {FILE}"
        )
    if path.name == "merges.txt":
        raise ValueError(f"{path} has no vocabulary: give the vocab.json beside it")
    config = {} if path.name == FILE else _config(path.parent)
    if path.suffix == ".model":
        options = _options(config, lowercase="do_lower_case", split_by_punct="split_by_punct")
        options |= _options(config, add_prefix_space="add_prefix_space")
        with _reading(path):
            tokenizer = unigram(path.read_bytes(), byte_fallback=byte_fallback, **options)
    elif path.name == "vocab.json":
        tokenizer = _load_bpe(path, _options(config, add_prefix_space="add_prefix_space"))
    elif path.suffix == ".txt":
        tokenizer = _load_wordpiece(path, config)
    else:
        return _load_whole(path, pairs)
    _add_tokens(tokenizer, path.parent, config)
    return tokenizer


def save(tokenizer: "Tokenizer", directory: str | Path) -> None:
    """Writes tokenizer.json, and tokenizer_config.json so that transformers loads it too.

    Each file is written whole or not at all.
    """
    names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Without this, transformers 5 gives no token types, which tell ELECTRA the two texts apart.
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, SPECIAL_TOKENS, strict=True)),
    }
    write_atomically(Path(directory) / FILE, tokenizer.to_str(pretty=True))
    write_atomically(Path(directory) / CONFIG_FILE, json.dumps(config, indent=2))


def _vocabulary(path: Path) -> Path:
    """The file that `path` names, or the one to read of a directory."""
    if path.is_dir():
        found = [path / name for name in _VOCABULARIES if (path / name).is_file()]
        if not found:
            others = "spm.model, spiece.model, vocab.json with merges.txt, vocab.txt"
            raise FileNotFoundError(f"no such file: {path / FILE} (nor one of {others})")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return path


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the libraries raise for a file that is none of theirs into a ValueError."""
    try:
        yield
    except OSError:
        raise
    except ValueError as error:  # ours
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer: {error}") from None


def _load_whole(path: Path, pairs: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    with _reading(path):
        tokenizer = Tokenizer.from_file(str(path))
        for token in SPECIAL_TOKENS:
            special_id(tokenizer, token)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokens = tokenizer.encode("a", "a").tokens
    if pairs == "single" and (SEP, SEP) in zip(tokens, tokens[1:], strict=False):
        warnings.warn(
            f"{path} frames pairs as [CLS] A [SEP] [SEP] B [SEP]; DeBERTa was pre-trained with "
            "[CLS] A [SEP] B [SEP], which is used. pairs='keep' keeps the file's frame.",
            stacklevel=3,
        )
        frame(tokenizer)
    return tokenizer


def _load_bpe(path: Path, options: dict[str, Any]) -> "Tokenizer":
    from tokenizers import models

    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise FileNotFoundError(f"no such file: {merges}")
    with _reading(path):
        return byte_level_bpe(models.BPE.from_file(str(path), str(merges)), **options)


def _load_wordpiece(path: Path, config: dict[str, Any]) -> "Tokenizer":
    vocab = {token: number - 1 for number, token in read_lines(path) if token}
    options = _options(
        config,
        lowercase="do_lower_case",
        tokenize_chinese_chars="tokenize_chinese_chars",
        strip_accents="strip_accents",
    )
    with _reading(path):
        return wordpiece(vocab, **options)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    return _read_json_object(path) if path.is_file() else {}


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _options(config: dict[str, Any], **names: str) -> dict[str, bool]:
    """Options that a tokenizer_config.json gives, by our names; null leaves the default."""
    options = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    for ours, value in options.items():
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{names[ours]} in {CONFIG_FILE} must be true or false, got {value!r}")
    return {ours: value for ours, value in options.items() if value is not None}


def _add_tokens(tokenizer: "Tokenizer", directory: Path, config: dict[str, Any]) -> None:
    """Adds the tokens that a checkpoint has beyond its vocabulary, at the ids that it says."""
    from tokenizers import AddedToken

    added: dict[int, AddedToken] = {}
    path = directory / "added_tokens.json"
    if path.is_file():
        added = {i: AddedToken(token) for token, i in _read_json_object(path).items()}
    for index, token in config.get("added_tokens_decoder", {}).items():
        if isinstance(token, dict) and "content" in token:
            names = ("single_word", "lstrip", "rstrip", "normalized", "special")
            flags = {name: bool(token[name]) for name in names if name in token}
            added[int(index)] = AddedToken(token["content"], **flags)
    for index, token in sorted(added.items()):
        if tokenizer.token_to_id(token.content) is None:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            raise ValueError(
                f"{directory} wants {token.content} at {index}, "
                f"but it is {tokenizer.token_to_id(token.content)} in the vocabulary"
            )
