from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vpipe.data.store import ArrayWriter, StoredFile, atomic_directory, check_file, open_array
from vpipe.errors import DataError


def _write(out: Path, text: str, *, force: bool = False) -> None:
    with atomic_directory(out, force=force, marker="meta.json") as staging:
        (staging / "meta.json").write_text(text)


def _array(root: Path) -> StoredFile:
    writer = ArrayWriter(root / "a.npy", 3, np.zeros((1, 2), dtype=np.int16))
    writer.add(np.array([[1, 2], [3, 4]], dtype=np.int16))
    writer.add(np.array([[5, 6]], dtype=np.int16))
    return writer.close(root)


def test_directory_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "set"
    with atomic_directory(out, force=False, marker="meta.json") as staging:
        (staging / "meta.json").write_text("x")
        assert not out.exists()
    assert (out / "meta.json").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["set"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    def write_and_fail() -> None:
        with atomic_directory(tmp_path / "set", force=False, marker="meta.json") as staging:
            (staging / "meta.json").write_text("x")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_old_set_survives_an_error(tmp_path: Path) -> None:
    _write(tmp_path / "set", "old")
    with pytest.raises(ValueError), atomic_directory(tmp_path / "set", force=True, marker="meta.json"):  # noqa: PT011
        raise ValueError
    assert (tmp_path / "set" / "meta.json").read_text() == "old"


def test_force_replaces(tmp_path: Path) -> None:
    _write(tmp_path / "set", "old")
    (tmp_path / "set" / "more").touch()
    _write(tmp_path / "set", "new", force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "meta.json"]
    assert (tmp_path / "set" / "meta.json").read_text() == "new"


def test_old_set_is_kept_without_force(tmp_path: Path) -> None:
    _write(tmp_path / "set", "old")
    with pytest.raises(DataError, match="already holds a prepared set; add --force to replace it"):
        _write(tmp_path / "set", "new")
    assert (tmp_path / "set" / "meta.json").read_text() == "old"


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"partial-{ended.pid}", f"partial-{os.getpid()}", f"partial-{os.getppid()}", "partial-1.old"):
        (tmp_path / f".set.{name}").mkdir()
    (tmp_path / f".other.partial-{ended.pid}").mkdir()
    _write(tmp_path / "set", "new")
    kept = {f".set.partial-{os.getppid()}", ".set.partial-1.old", f".other.partial-{ended.pid}", "set"}
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("force", [False, True])
def test_other_directories_are_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match="is not empty and holds no prepared set, so it is left alone"):
        _write(tmp_path, "new", force=force)
    assert (tmp_path / "thesis.tex").exists()


def test_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    _write(tmp_path / "set", "new")
    assert (tmp_path / "set" / "meta.json").exists()


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "set").touch()
    with pytest.raises(DataError, match="exists and is no directory; choose another --out"):
        _write(tmp_path / "set", "new", force=True)


def test_writing_that_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/set could not be written: Not a directory; check space and permissions"):
        _write(tmp_path / "file" / "set", "new")


def test_array_comes_back_memory_mapped_and_read_only(tmp_path: Path) -> None:
    stored = _array(tmp_path)
    assert (stored.file, stored.dtype, stored.shape) == ("a.npy", "int16", (3, 2))
    array = open_array(tmp_path, stored, "fix")
    assert isinstance(array, np.memmap)
    assert np.asarray(array).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert not array.flags.writeable


def test_missing_file(tmp_path: Path) -> None:
    stored = _array(tmp_path)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(DataError, match=r"a.npy is missing; do this"):
        check_file(tmp_path, stored, "do this")


@pytest.mark.parametrize(("change", "what"), [(-4, "truncated"), (4, "too long")])
def test_wrong_size(tmp_path: Path, change: int, what: str) -> None:
    stored = _array(tmp_path)
    content = (tmp_path / "a.npy").read_bytes() + b"0000"
    (tmp_path / "a.npy").write_bytes(content[: stored.num_bytes + change])
    sizes = f"{stored.num_bytes + change} bytes, {stored.num_bytes} were written; do this"
    with pytest.raises(DataError, match=f"a.npy is {what}: {sizes}"):
        open_array(tmp_path, stored, "do this")


def test_changed_content_is_found_when_asked_for(tmp_path: Path) -> None:
    stored = _array(tmp_path)
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-1] + b"\x7f")
    check_file(tmp_path, stored, "do this")
    with pytest.raises(DataError, match=r"other content than was written \(sha256 differs\); do this"):
        check_file(tmp_path, stored, "do this", verify=True)


def test_another_array_of_the_same_size(tmp_path: Path) -> None:
    stored = _array(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((2, 3), dtype=np.int16))
    with pytest.raises(
        DataError, match=r"holds int16 of shape \(2, 3\), meta.json says int16 of shape \(3, 2\); do this"
    ):
        open_array(tmp_path, stored, "do this")


def test_no_array(tmp_path: Path) -> None:
    stored = _array(tmp_path)
    (tmp_path / "a.npy").write_bytes(b"x" * stored.num_bytes)
    with pytest.raises(DataError, match=r"a.npy is no array file .*; do this"):
        open_array(tmp_path, stored, "do this")
