"""Files are whole or not there."""

import os

import pytest

from fastdeberta.files import atomic_directory, write_atomically


def content(directory):
    return {p.name: p.read_text() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def old(tmp_path):
    directory = tmp_path / "parent" / "data"
    with atomic_directory(directory) as fresh:
        (fresh / "a").write_text("old")
        (fresh / "b").write_text("old")
        assert not directory.exists()
    assert content(directory) == {"a": "old", "b": "old"}
    return directory


def test_a_directory_is_replaced_as_a_whole(old):
    with atomic_directory(old) as fresh:
        assert list(fresh.iterdir()) == []
        (fresh / "a").write_text("new")
        assert content(old) == {"a": "old", "b": "old"}
    assert content(old) == {"a": "new"}
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_old_directory(error, old):
    with pytest.raises(error), atomic_directory(old) as fresh:
        (fresh / "a").write_text("new")
        raise error
    assert content(old) == {"a": "old", "b": "old"}
    assert list(old.parent.iterdir()) == [old]


def test_what_a_killed_writer_left_is_in_nobodys_way(old):
    left = old.with_name(f".{old.name}.writing-{os.getpid()}")
    left.mkdir()
    (left / "half").touch()
    with atomic_directory(old) as fresh:
        (fresh / "a").write_text("new")
    assert content(old) == {"a": "new"}


def test_a_text_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "parent" / "text"
    for text in ("old \u00e9", "new", ""):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_text(tmp_path):
    path = tmp_path / "text"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, 100_000 * "new" + "\ud800")  # No UTF-8 for half a surrogate pair.
    assert content(tmp_path) == {"text": "old"}
