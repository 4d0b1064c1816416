"""A directory that is complete or not there, and arrays in it that are checked when they are opened."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from vpipe.errors import DataError

__all__ = [
    "ArrayWriter",
    "StoredFile",
    "atomic_directory",
    "check_destination",
    "check_file",
    "describe_file",
    "open_array",
]

_DAMAGED_HEAD = (ValueError, TokenError, SyntaxError, TypeError, OverflowError)
"""What `numpy.load` raises for an array file whose first bytes are damaged: it evaluates them as Python text."""


class StoredFile(BaseModel):
    """A file of a prepared set, as `meta.json` describes it; `dtype` and `shape` only for arrays."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    num_bytes: int
    sha256: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


def check_destination(out: Path, force: bool, marker: str) -> None:
    """Refuse a destination that holds something.

    With `force` a directory with a file named `marker`, that is an earlier result, may be replaced.

    Raises:
        DataError: `out` is a file, or a directory that may not be replaced.
    """
    if not out.is_dir():
        if out.exists() or out.is_symlink():
            raise DataError(f"{out} exists and is no directory; choose another --out")
        return
    if not any(out.iterdir()):
        return
    if not (out / marker).is_file():
        raise DataError(f"{out} is not empty and holds no prepared set, so it is left alone; choose another --out")
    if not force:
        raise DataError(f"{out} already holds a prepared set; add --force to replace it, or choose another --out")


@contextmanager
def atomic_directory(out: Path, *, force: bool, marker: str) -> Iterator[Path]:
    """Give a new directory beside `out`, and make it `out` when the block ends without an error; else remove it.

    What earlier processes left there when they were killed is removed too.

    Raises:
        DataError: see `check_destination`, or writing failed (no permission, no space).
    """
    check_destination(out, force, marker)
    out = out.resolve()
    staging = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        _remove_abandoned(out)
        staging.mkdir(parents=True)
        yield staging
        check_destination(out, force, marker)  # somebody may have written it meanwhile
        _move(staging, out)
    except OSError as error:
        raise DataError(
            f"{out} could not be written: {error.strerror or error}; check space and permissions"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    for path in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        owner = path.name.rpartition("-")[2]  # one that ends in .old holds a set that was there before, and stays
        if owner.isdigit() and (int(owner) == os.getpid() or not Path("/proc", owner).exists()):
            shutil.rmtree(path, ignore_errors=True)


def _move(staging: Path, out: Path) -> None:
    old = staging.with_name(f"{staging.name}.old")
    if out.is_dir():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)


class ArrayWriter:
    """Write a `.npy` file block after block along the first dimension, `num_rows` in all.

    Plain writes, not a memory map: on a full disk they raise an error where a map would kill the process.
    """

    def __init__(self, path: Path, num_rows: int, like: NDArray[np.generic]) -> None:
        self.path = path
        self._dtype, self._shape = like.dtype, (num_rows, *like.shape[1:])
        self._file = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def add(self, block: NDArray[np.generic]) -> None:
        """Append rows."""
        self._file.write(np.ascontiguousarray(block).tobytes())

    def close(self, root: Path) -> StoredFile:
        """Finish the file and describe it relative to `root`."""
        self._file.close()
        return describe_file(self.path, root, dtype=self._dtype.name, shape=self._shape)


def describe_file(
    path: Path, root: Path, *, dtype: str | None = None, shape: tuple[int, ...] | None = None
) -> StoredFile:
    """Return size and fingerprint of a finished file, with its path relative to `root`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = path.relative_to(root).as_posix()
    return StoredFile(file=name, num_bytes=path.stat().st_size, sha256=digest, dtype=dtype, shape=shape)


def check_file(root: Path, stored: StoredFile, fix: str, *, verify: bool = False) -> Path:
    """Return the path of a stored file after comparing its size, and with `verify` its content, to what was written.

    Raises:
        DataError: missing, truncated or changed; the message ends with `fix`.
    """
    path = root / stored.file
    if not path.is_file():
        raise DataError(f"{path} is missing; {fix}")
    if (size := path.stat().st_size) != stored.num_bytes:
        what = "truncated" if size < stored.num_bytes else "too long"
        raise DataError(f"{path} is {what}: {size} bytes, {stored.num_bytes} were written; {fix}")
    if verify and describe_file(path, root).sha256 != stored.sha256:
        raise DataError(f"{path} has other content than was written (sha256 differs); {fix}")
    return path


def open_array(root: Path, stored: StoredFile, fix: str) -> NDArray[np.generic]:
    """Map a stored array into memory, read-only.

    Raises:
        DataError: the file is missing, truncated or holds another array.
    """
    path = check_file(root, stored, fix)
    try:
        array: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    except _DAMAGED_HEAD as error:
        raise DataError(f"{path} is no array file ({error}); {fix}") from error
    if array.dtype.name != stored.dtype or array.shape != stored.shape:
        raise DataError(
            f"{path} holds {array.dtype.name} of shape {array.shape}, "
            f"meta.json says {stored.dtype} of shape {stored.shape}; {fix}"
        )
    return array
