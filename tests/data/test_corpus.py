from __future__ import annotations

import re
from pathlib import Path

import pytest

from vpipe.data.text.corpus import DocumentRule, read_files, split_documents, without_duplicates
from vpipe.errors import DataError


@pytest.mark.parametrize(
    ("rule", "used", "documents"),
    [
        ("auto", "two-blank-lines", ["a\nb\n\nc", "d"]),
        ("two-blank-lines", "two-blank-lines", ["a\nb\n\nc", "d"]),
        ("blank-line", "blank-line", ["a\nb", "c", "d"]),
        ("line", "line", ["a", "b", "c", "d"]),
        ("file", "file", ["a\nb\n\nc\n\n\nd"]),
    ],
)
def test_rules(rule: DocumentRule, used: DocumentRule, documents: list[str]) -> None:
    assert split_documents("\n\na\nb\n\nc\n\n\nd\n", rule) == (used, documents)


@pytest.mark.parametrize(
    ("text", "rule", "documents"),
    [
        ("a\nb\n\nc\n", "blank-line", ["a\nb", "c"]),
        ("a\nb\nc\n\n\n", "line", ["a", "b", "c"]),
        ("a\r\nb\r\n\r\n\r\nc\r\n", "two-blank-lines", ["a\nb", "c"]),
        ("a\n \t\n\u3000\nb", "two-blank-lines", ["a", "b"]),
        ("", "line", []),
    ],
)
def test_auto_looks_at_the_text(text: str, rule: DocumentRule, documents: list[str]) -> None:
    assert split_documents(text) == (rule, documents)


def test_files_are_read_in_order_and_described(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes("\ufeffdrei\n\nvier".encode())
    corpus = read_files([tmp_path / "b.txt", tmp_path / "a.txt"])
    assert corpus.documents == ("one", "two", "drei", "vier")
    assert [(origin.name, origin.rule, origin.num_documents) for origin in corpus.origins] == [
        ("b.txt", "line", 2),
        ("a.txt", "blank-line", 2),
    ]
    assert corpus.from_files


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.txt cannot be read \(No such file or directory\); check --input"):
        read_files([tmp_path / "nowhere.txt"])


def test_directory_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a directory; give .*: --input \S+/a.txt --input \S+/b.txt$"):
        read_files([tmp_path])
    for name in ("cover.png", "my book.txt", "next.txt", "other.txt"):
        (tmp_path / name).write_text("text")
    advice = f"--input before each of them: --input '{tmp_path}/my book.txt' --input {tmp_path}/next.txt"
    with pytest.raises(DataError, match=re.escape(advice) + "$"):
        read_files([tmp_path])


@pytest.mark.parametrize("content", ["", " \n\n \n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"empty.txt has no text; leave it out of --input or fill it"):
        read_files([tmp_path / "empty.txt"])


def test_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "gbk.txt").write_bytes("abc 春眠不覺曉".encode("gb18030"))
    with pytest.raises(DataError, match=r"gbk.txt is not UTF-8 text: byte 4 is 0xb4; .* iconv -f ENCODING -t UTF-8"):
        read_files([tmp_path / "gbk.txt"])


def test_a_file_with_zero_bytes_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "wide.txt").write_bytes("rain falls".encode("utf-16-le"))  # valid UTF-8, as it happens
    with pytest.raises(DataError, match=r"wide.txt is not UTF-8 text: byte 1 is 0x00; .* iconv -f ENCODING -t UTF-8"):
        read_files([tmp_path / "wide.txt"])


def test_duplicates_differ_in_more_than_white_space() -> None:
    assert without_duplicates(["a  b", "c", "a b", "a b\n", "C"]) == ["a  b", "c", "C"]
