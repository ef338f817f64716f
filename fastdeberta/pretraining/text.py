"""Text in, training rows out: corpora, tokenizers, packing."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..datasets import wiki_leads
from ..files import write_atomically

PAD, CLS, SEP, UNK, MASK = SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
TOKENIZER = "tokenizer.json"
EMBEDDED = "wiki-leads"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file.

    Raises:
        FileNotFoundError: no such file. ValueError: not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                encoding = "utf-8-sig" if number == 1 else "utf-8"  # A file may open with a mark.
                yield number, line.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8: line {number}, byte {error.start + 1}"
                ) from None


def read_documents(source: str | Path) -> list[str]:
    """The documents of a corpus.

    Args:
        source: "wiki-leads", the embedded text; a .jsonl file of objects with a "text"; a text
            file whose documents are separated by blank lines; or a directory of such files.

    Raises:
        FileNotFoundError: no such file or directory.
        ValueError: not UTF-8, a line that is not such an object, or no text at all.
    """
    if source == EMBEDDED:
        return [article.text for article in wiki_leads()]
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
    else:
        files = [path]
    documents = [
        document
        for file in files
        for document in (_jsonl(file) if file.suffix == ".jsonl" else _paragraphs(file))
    ]
    if not documents:
        raise ValueError(f"data: no text in {source}")
    return documents


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f'{path}, line {number}: expected a JSON object with a "text"'
            ) from None
        if isinstance(text, str) and text.strip():
            yield text


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for _, line in read_lines(path):
        if line.strip():
            lines.append(line.strip())
        elif lines:
            yield " ".join(lines)
            lines = []
    if lines:
        yield " ".join(lines)


def split(documents: Sequence, held_out: float, seed: int = 0) -> tuple[list, list]:
    """Shuffles and splits: (the rest, a `held_out` fraction, at least one of each if possible)."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(len(documents) * held_out)), len(documents) - 1)
    return [documents[i] for i in order[count:]], [documents[i] for i in order[:count]]


def train_tokenizer(documents: Iterable[str], vocab_size: int, lowercase: bool = False):
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


def load_tokenizer(path: str | Path):
    """A tokenizers.Tokenizer from a tokenizer.json, or from a directory that holds one.

    Raises:
        FileNotFoundError: no such file. ValueError: not a tokenizer, or it lacks a special token.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    if path.is_dir():
        path = path / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    for token in SPECIAL_TOKENS:
        special_id(tokenizer, token)
    return tokenizer


def save_tokenizer(tokenizer, directory: str | Path) -> None:
    """Writes tokenizer.json, and tokenizer_config.json so that transformers loads it too."""
    names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(names, SPECIAL_TOKENS, strict=True)),
    }
    write_atomically(Path(directory) / TOKENIZER, tokenizer.to_str(pretty=True))
    write_atomically(Path(directory) / "tokenizer_config.json", json.dumps(config, indent=2))


def special_id(tokenizer, token: str) -> int:
    """The id of a special token that the tokenizer must have."""
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ValueError(f"the tokenizer has no {token} token")
    return index


def pack(tokenizer, documents: Sequence[str], length: int) -> Tensor:
    """Documents as rows of `length` tokens, [rows, length] int64.

    Each row is [CLS] tokens [SEP]; documents follow one another, separated by [SEP]. Only the last
    row may end in [PAD].
    """
    if length < 4:
        raise ValueError(f"sequence_length must be at least 4, got {length}")
    cls, sep, pad = (special_id(tokenizer, t) for t in (CLS, SEP, PAD))
    encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    pieces = [torch.tensor([*e.ids, sep]) for e in encodings]
    stream = torch.cat(pieces)[:-1]
    width = length - 2
    rows = -(-stream.numel() // width)
    body = torch.full((rows * width,), pad)
    body[: stream.numel()] = stream
    packed = torch.full((rows, length), cls)
    packed[:, 1:-1] = body.view(rows, width)
    packed[:, -1] = sep
    used = stream.numel() - (rows - 1) * width
    if used < width:  # The last row's [SEP] follows its text.
        packed[-1, used + 1], packed[-1, -1] = sep, pad
    return packed
