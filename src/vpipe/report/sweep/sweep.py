"""A sweep: every combination of some settings, run or simulated one after another, and what came out of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from vpipe.config import RunConfig, dump_config, read_config
from vpipe.config.renamed import with_first_names
from vpipe.config.tree import parse_override
from vpipe.errors import ConfigError, VPipeError

__all__ = ["Axis", "Combination", "Result", "Row", "combine", "parse_axis", "resolve", "run_sweep", "short_key"]

_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "'\""


@dataclass(frozen=True)
class Axis:
    """One setting that is swept, and its values as they were written."""

    key: str
    values: tuple[str, ...]

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """The values as numbers, or None when one is none."""
        try:
            return tuple(map(float, self.values))
        except ValueError:
            return None


@dataclass(frozen=True)
class Combination:
    """One value of each axis, and the run that it makes of the configuration, or why it makes none."""

    axes: tuple[Axis, ...]
    values: tuple[str, ...]
    run: RunConfig | None = None
    error: str = ""

    @property
    def overrides(self) -> tuple[str, ...]:
        """The values as `--set` takes them."""
        return tuple(f"{axis.key}={value}" for axis, value in zip(self.axes, self.values, strict=True))

    @property
    def label(self) -> str:
        """The values in one line."""
        return "  ".join(self.overrides)

    @property
    def fingerprint(self) -> str:
        """A name for everything that decides the run, or nothing where there is none; where it writes is left out."""
        if self.run is None:
            return ""
        text = dump_config(self.run.model_copy(update={"log_directory": Path()}))
        return hashlib.sha256(with_first_names(text).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """What came out of a run: numbers by name, and its folder where it has one."""

    metrics: Mapping[str, float | None]
    folder: str = ""


@dataclass(frozen=True)
class Row:
    """What is kept of a combination: numbers, or the reason why there are none."""

    values: tuple[str, ...]
    fingerprint: str
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    folder: str = ""
    error: str = ""

    @property
    def is_done(self) -> bool:
        """Tell whether there are numbers."""
        return not self.error


def parse_axis(text: str) -> Axis:
    """Read 'key=value,value,...'; commas inside brackets and quotes belong to the value.

    Raises:
        ConfigError: no key, no value, one given twice, or one that is not YAML.
    """
    key, equals, listed = text.partition("=")
    values = tuple(part.strip() for part in _split(listed))
    if not equals or not key.strip() or not all(values):
        raise ConfigError(f"--over {text}: is not of the form key=value,value,..., e.g. batch_size=8,16,32")
    for value in values:
        parse_override(f"{key.strip()}={value}")
        if values.count(value) > 1:
            raise ConfigError(f"--over {text}: {value} is given twice; give each value once")
    return Axis(key.strip(), values)


def short_key(axis: Axis) -> str:
    """Return the key without its section, for tables and pictures."""
    return axis.key.rpartition(".")[2]


def combine(axes: Sequence[Axis]) -> list[Combination]:
    """Return all combinations, those of the last axis next to each other.

    Raises:
        ConfigError: two axes are of one key.
    """
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--over {key} is given twice; give all values at once: --over {key}=value,value,...")
    return [Combination(tuple(axes), values) for values in product(*(axis.values for axis in axes))]


def resolve(combination: Combination, path: Path, overrides: Sequence[str]) -> Combination:
    """Read the configuration with `overrides` and the combination's values on top; what is wrong becomes its error."""
    try:
        run = read_config(path, [*overrides, *combination.overrides]).config
    except ConfigError as error:
        return Combination(combination.axes, combination.values, error=str(error).removeprefix(f"{path}: "))
    return Combination(combination.axes, combination.values, run)


def run_sweep(
    combinations: Sequence[Combination],
    kept: Mapping[tuple[str, ...], Row],
    execute: Callable[[Combination, RunConfig], Result],
) -> Iterator[tuple[Combination, Row]]:
    """Yield a row for each combination in turn: from `kept` where it is done there, else from `execute`.

    A combination that fails has the reason in its row, and the others go on.
    """
    for combination in combinations:
        earlier = kept.get(combination.values)
        if earlier is not None and earlier.is_done:
            yield combination, earlier
            continue
        values, fingerprint, reason = combination.values, combination.fingerprint, combination.error
        row = Row(values, fingerprint, error=reason)
        if combination.run is not None:
            try:
                result = execute(combination, combination.run)
            except VPipeError as error:
                row = Row(values, fingerprint, error=str(error))
            else:
                row = Row(values, fingerprint, result.metrics, result.folder)
        yield combination, row


def _split(text: str) -> list[str]:
    """Split at commas that are not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPENING + _CLOSING:
            depth += 1 if letter in _OPENING else -1
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
