"""What to say of a prepared set that is already where another is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vpipe.data.bert.meta import META_FILE, BertMeta, BertOptions, read_meta
from vpipe.errors import DataError

__all__ = ["refuse_existing"]


def refuse_existing(out: Path, inputs: Sequence[Path], options: BertOptions) -> None:
    """Refuse to prepare `inputs` into `out` where a set is there already, and say how the two differ.

    Files are compared by content: another file of the same name is another text.

    Raises:
        DataError: `out` holds a prepared set.
    """
    if not (out / META_FILE).is_file():
        return
    meta = read_meta(out)
    if differences := [*_other_text(meta, inputs), *_other_options(meta, options)]:
        raise DataError(
            f"{out} already holds a set prepared {' and '.join(differences)}; add --force to replace it, or choose "
            "another --out"
        )
    raise DataError(
        f"{out} already holds a set prepared from the same text with the same options, so it can be used as it is; "
        "add --force to make it anew, or choose another --out"
    )


def _other_text(meta: BertMeta, inputs: Sequence[Path]) -> list[str]:
    known = [origin.sha256 for origin in meta.origins] if meta.from_files else []
    if [_fingerprint(path) for path in inputs] == known:
        return []
    there = "the text that comes with Python"
    if meta.from_files:
        there = ", ".join(
            f"{origin.path or origin.name} ({origin.num_bytes:,} bytes, sha256 {origin.sha256[:8]})"
            for origin in meta.origins
        )
    now = ", ".join(f"{path} ({_size(path)})" for path in inputs) or "the text that comes with Python"
    return [f"from other text ({there}; asked for now: {now})"]


def _other_options(meta: BertMeta, options: BertOptions) -> list[str]:
    if meta.options == options:
        return []
    there, now = (" ".join(each.flags()) or "the defaults" for each in (meta.options, options))
    return [f"with other options ({there}; asked for now: {now})"]


def _fingerprint(path: Path) -> str | None:
    """Return the sha256 of a file, or None where there is no such file to read."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> str:
    content = _fingerprint(path)
    return "no such file" if content is None else f"{path.stat().st_size:,} bytes, sha256 {content[:8]}"
