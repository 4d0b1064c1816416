"""Text files into documents."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vpipe.data.progress import Progress, no_progress
from vpipe.errors import DataError

__all__ = ["Corpus", "DocumentRule", "TextOrigin", "read_files", "split_documents", "without_duplicates"]

DocumentRule = Literal["auto", "two-blank-lines", "blank-line", "line", "file"]

# A blank line may hold spaces, the wide one of Chinese text included.
_ONE_BLANK = re.compile(r"\n(?:[^\S\n]*\n)+")
_LINE_END = re.compile(r"\n")
_TWO_BLANK = re.compile(r"\n(?:[^\S\n]*\n){2,}")


@dataclass(frozen=True)
class TextOrigin:
    """Where documents came from and how they were told apart; `sha256` is that of the text.

    `path` is the file's own, from the root on, so that another file of this name is not mistaken for it; it is None for
    the text that comes with Python, and in sets of earlier versions.
    """

    name: str
    num_bytes: int
    sha256: str
    rule: str
    num_documents: int
    path: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and their origins; `from_files` is false for the text that comes with Python."""

    documents: tuple[str, ...]
    origins: tuple[TextOrigin, ...]
    from_files: bool = True


def read_files(paths: Sequence[Path], rule: DocumentRule = "auto", progress: Progress = no_progress) -> Corpus:
    """Read documents from UTF-8 text files, in the order of `paths` and in the order of the text.

    Raises:
        DataError: a file is missing, is not UTF-8 text or has no text.
    """
    documents: list[str] = []
    origins = []
    for number, path in enumerate(paths):
        progress("read", number, len(paths))
        text, origin_hash, num_bytes = _read_text(path)
        used, found = split_documents(text, rule)
        if not found:
            raise DataError(f"{path} has no text; leave it out of --input or fill it")
        documents += found
        origins.append(TextOrigin(path.name, num_bytes, origin_hash, used, len(found), str(path.absolute())))
    progress("read", len(paths), len(paths))
    return Corpus(tuple(documents), tuple(origins))


def split_documents(text: str, rule: DocumentRule = "auto") -> tuple[DocumentRule, list[str]]:
    """Return the rule that was applied and the documents, empty ones left out.

    `two-blank-lines`: two or more blank lines end a document, a single one ends a paragraph. `blank-line`: any blank
    line ends a document (the format of the original BERT: one sentence a line). `line`: each line is a document.
    `file`: all is one. `auto`: two-blank-lines where the text has two in a row, else blank-line where it has one, else
    line.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if rule == "auto":
        rule = "two-blank-lines" if _TWO_BLANK.search(text) else "blank-line" if _ONE_BLANK.search(text) else "line"
    ends = {"two-blank-lines": _TWO_BLANK, "blank-line": _ONE_BLANK, "line": _LINE_END}
    pieces = ends[rule].split(text) if rule in ends else [text]
    return rule, [piece for piece in pieces if piece.strip()]


def without_duplicates(documents: Sequence[str]) -> list[str]:
    """Drop documents that repeat an earlier one up to white space: no copy of a training text is evaluated on."""
    first: dict[str, str] = {}
    for document in documents:
        first.setdefault(" ".join(document.split()), document)
    return list(first.values())


def _read_text(path: Path) -> tuple[str, str, int]:
    """Return the text, the sha256 and the size in bytes of a file."""
    if path.is_dir():
        names = [each.name for each in sorted(path.glob("*.txt"))][:2] or ["a.txt", "b.txt"]
        example = " ".join(f"--input {shlex.quote(str(path / name))}" for name in names)
        raise DataError(f"{path} is a directory; give the text files in it, --input before each of them: {example}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check --input") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path, raw, error.start) from error
    if b"\0" in raw:  # binary, or UTF-16 without its mark
        raise _not_text(path, raw, raw.index(b"\0"))
    return text, hashlib.sha256(raw).hexdigest(), len(raw)


def _not_text(path: Path, raw: bytes, position: int) -> DataError:
    return DataError(
        f"{path} is not UTF-8 text: byte {position} is {raw[position]:#04x}; "
        f"convert it first, for example: iconv -f ENCODING -t UTF-8 {path}"
    )
