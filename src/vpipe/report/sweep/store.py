"""The folder of a sweep: what is swept, a line per finished combination, and the table and the picture made of them.

``sweep.json`` says what the sweep is, ``rows.jsonl`` grows by a line whenever a combination ends, so that a sweep that
was interrupted goes on where it was; ``table.csv`` and ``plot.svg`` are made anew from it each time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vpipe.config.text import parse_json, read_text
from vpipe.errors import ConfigError
from vpipe.report.sweep.chart import draw_chart
from vpipe.report.sweep.sweep import Combination, Row
from vpipe.report.sweep.table import table_csv

__all__ = ["PLOT", "TABLE", "SweepStore"]

_WHAT = "sweep.json"
_ROWS = "rows.jsonl"
TABLE, PLOT = "table.csv", "plot.svg"


class SweepStore:
    """Keeps what came out of a sweep's combinations in `directory`."""

    def __init__(self, directory: Path, combinations: Sequence[Combination], what: Mapping[str, Any]) -> None:
        """Make the directory, or take up one that holds the same sweep; `what` tells sweeps apart, beside their axes.

        Raises:
            ConfigError: it holds another sweep or something else, results of another configuration, or cannot be made.
        """
        self.directory = directory
        self.rows: dict[tuple[str, ...], Row] = {}
        self._combinations = combinations
        self.axes = combinations[0].axes
        content = {**what, "over": [[axis.key, *axis.values] for axis in self.axes]}
        try:
            self._open(content)
        except OSError as error:
            raise ConfigError(f"--output {directory}: cannot be used: {error.strerror}; choose another") from None
        self._check_rows()

    def add(self, row: Row) -> None:
        """Keep one more row, on disk too.

        Raises:
            ConfigError: it cannot be written.
        """
        self.rows[row.values] = row
        try:
            with (self.directory / _ROWS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            self.write_reports()
        except OSError as error:
            raise ConfigError(f"--output {self.directory}: cannot be written: {error.strerror}; check space") from None

    def write_reports(self) -> None:
        """Make the table and the picture of all rows there are, in the order of the combinations."""
        rows = [row for _, row in self.in_order()]
        self._replace(TABLE, table_csv(self.axes, rows))
        self._replace(PLOT, draw_chart(self.axes, rows))

    def in_order(self) -> list[tuple[Combination, Row]]:
        """Return the combinations that have a row, in order, with it."""
        return [(each, self.rows[each.values]) for each in self._combinations if each.values in self.rows]

    def _open(self, content: Mapping[str, Any]) -> None:
        place = self.directory / _WHAT
        if place.exists():
            found = parse_json(read_text(place), str(place))
            if found != content:
                raise ConfigError(
                    f"--output {self.directory}: holds another sweep, {_describe(found)}; choose another folder, or "
                    "repeat that sweep to go on with it"
                )
            self._read_rows()
            return
        if self.directory.exists() and any(self.directory.iterdir()):
            raise ConfigError(f"--output {self.directory}: is not empty and holds no sweep; choose another folder")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._replace(_WHAT, json.dumps(content, indent=1) + "\n")

    def _read_rows(self) -> None:
        place = self.directory / _ROWS
        text = place.read_text(encoding="utf-8") if place.exists() else ""
        whole, _, rest = text.rpartition("\n")
        if rest:  # a line that was cut short when the sweep was killed
            self._replace(_ROWS, f"{whole}\n" if whole else "")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                content = json.loads(line)
                row = Row(**{**content, "values": tuple(content["values"])})
            except (ValueError, TypeError, KeyError):
                raise ConfigError(f"{place}, line {number}: is no row of a sweep; choose another folder") from None
            self.rows[row.values] = row

    def _check_rows(self) -> None:
        for each in self._combinations:
            row = self.rows.get(each.values)
            if row is not None and row.is_done and row.fingerprint != each.fingerprint:
                raise ConfigError(
                    f"--output {self.directory}: its result of {each.label} is of another configuration than the "
                    "present one; choose another folder"
                )

    def _replace(self, name: str, text: str) -> None:
        new = self.directory / f".{name}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(self.directory / name)


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return "of another form"
    over = " ".join(f"--over {key}={','.join(values)}" for key, *values in content.get("over", []))
    sets = " ".join(f"--set {override}" for override in content.get("overrides", []))
    how = "simulated" if content.get("simulate") else "run"
    return " ".join(part for part in (str(content.get("config")), over, sets, f"({how})") if part)
