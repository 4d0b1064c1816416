"""What `meta.json` of a prepared BERT set says, and the command that makes the set again."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from vpipe.data.draws import Stream
from vpipe.data.store import StoredFile
from vpipe.data.text.corpus import DocumentRule, TextOrigin
from vpipe.errors import ConfigError, DataError

__all__ = [
    "MASK_STREAMS",
    "META_FILE",
    "BertMeta",
    "BertOptions",
    "Masking",
    "Split",
    "SplitMeta",
    "fingerprint",
    "read_meta",
]

META_FILE = "meta.json"
Masking = Literal["static", "dynamic"]
Split = Literal["train", "eval"]
MASK_STREAMS: dict[Split, Stream] = {"train": Stream.MASK_TRAIN, "eval": Stream.MASK_EVAL}

_COMMAND = "vpipe data prepare bert"
_MOST = {"vocab_size": 1_000_000, "sequence_length": 131_072}  # far beyond what is in use, and memory for it is there


@dataclass(frozen=True)
class BertOptions:
    """How text becomes a training set; each field is a flag of `vpipe data prepare bert`.

    `documents` says what ends a document, see `split_documents`;
    `limit_samples` bounds each split; `num_passes` goes over the text several times, with other pairs and masks.

    Raises:
        ConfigError: a value is out of range.
    """

    vocab_size: int = 8192
    sequence_length: int = 128
    masking: Masking = "static"
    eval_fraction: float = 0.1
    seed: int = 0
    limit_samples: int | None = None
    num_passes: int = 1
    limit_alphabet: int = 9000
    lowercase: bool = True
    documents: DocumentRule = "auto"

    def __post_init__(self) -> None:
        limits = {"vocab_size": 64, "sequence_length": 8, "seed": 0, "num_passes": 1, "limit_alphabet": 1}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{_flag(name)} must be at least {least}, got {getattr(self, name)}")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ConfigError(f"{_flag(name)} must be at most {most}, got {getattr(self, name)}")
        if self.limit_samples is not None and self.limit_samples < 1:
            raise ConfigError(f"--limit-samples must be at least 1, got {self.limit_samples}")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction must be at least 0 and below 1, got {self.eval_fraction}")
        for name, allowed in (("masking", get_args(Masking)), ("documents", get_args(DocumentRule))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{_flag(name)} must be one of {', '.join(allowed)}, got '{getattr(self, name)}'")

    def flags(self) -> list[str]:
        """Return the flags that differ from the defaults."""
        words: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            words += ["--cased"] if field.name == "lowercase" else [_flag(field.name), str(value)]
        return words


class SplitMeta(BaseModel):
    """One split: its sizes, and its arrays by name. `num_tokens` leaves out padding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_documents: int
    num_samples: int
    num_tokens: int
    num_random_next: int
    unknown_share: float
    arrays: dict[str, StoredFile]


class BertMeta(BaseModel):
    """A prepared set. Nothing but the paths of its texts depends on where or when the set was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["vpipe-bert"] = "vpipe-bert"
    version: Literal[1] = 1
    fingerprint: str
    vocab_size: int
    options: BertOptions
    origins: tuple[TextOrigin, ...]
    from_files: bool
    num_duplicates: int
    tokenizer: tuple[StoredFile, ...]
    splits: dict[Split, SplitMeta]

    @model_validator(mode="after")
    def _hold_what_samples_need(self) -> BertMeta:
        length = (self.options.sequence_length,)
        tokens = {"static": ("input_ids", "labels"), "dynamic": ("tokens",)}[self.options.masking]
        per_sample = {**dict.fromkeys(tokens, length), "spans": (2,), "next_sentence_label": ()}
        for name, split in self.splits.items():
            shapes = {array: stored.shape for array, stored in split.arrays.items()}
            if shapes != {array: (split.num_samples, *shape) for array, shape in per_sample.items()}:
                raise ValueError(
                    f"split {name} has {split.num_samples} samples of {length[0]} tokens, {self.options.masking} "
                    f"masking, and arrays of the shapes {shapes}"
                )
        return self

    def files(self) -> tuple[StoredFile, ...]:
        """Return every file that `meta.json` describes."""
        return (*self.tokenizer, *(array for split in self.splits.values() for array in split.arrays.values()))

    def command(self, directory: Path, **changes: object) -> str:
        """Return the command that prepares the set anew, with `changes` to its options."""
        words = [*_COMMAND.split(), "--out", str(directory)]
        if self.from_files:
            words += [word for origin in self.origins for word in ("--input", origin.path or origin.name)]
        known: Mapping[str, object] = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        options = BertOptions(**{**known, **changes})  # type: ignore[arg-type]
        return shlex.join([*words, *options.flags(), "--force"])


def read_meta(directory: Path) -> BertMeta:
    """Read `meta.json`.

    Raises:
        DataError: there is no prepared set, or another program or version wrote it.
    """
    make = shlex.join([*_COMMAND.split(), "--out", str(directory)])
    path = directory / META_FILE
    if not directory.exists():
        raise DataError(
            f"there is no prepared data in {directory}; make it with `{make}`, or correct "
            "data.data_dir (a relative one starts from the folder of the run's YAML file)"
        )
    if not path.is_file():
        raise DataError(
            f"{directory} has no {META_FILE}, so it is no prepared set; "
            f"make one with `{make}` (in an empty or new directory), or correct data.data_dir"
        )
    try:
        return BertMeta.model_validate_json(path.read_bytes())
    except (ValidationError, ConfigError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = " ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise DataError(
            f"{path} is damaged or from another version ({reason}); prepare it again with `{make} --force`, "
            "and --input FILE for each text of your own"
        ) from error


def fingerprint(files: Sequence[StoredFile]) -> str:
    """Return one hash over the hashes of all files."""
    text = "".join(f"{stored.file} {stored.sha256}\n" for stored in files)
    return hashlib.sha256(text.encode()).hexdigest()


def _flag(name: str) -> str:
    return "--" + {"num_passes": "passes"}.get(name, name).replace("_", "-")
