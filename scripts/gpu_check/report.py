"""What came out, as one table and as a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_check.check import Check, Outcome
from vpipe.words.table import format_table

__all__ = ["outcome_table", "plan_table", "say", "write_report"]

_WIDEST = 140


def say(text: str = "") -> None:
    """Write a line to standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def outcome_table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return one line per check: the result, the seconds, and what was found or is wrong."""
    rows = [["check", "result", "seconds", "what was found"]]
    for outcome in outcomes:
        result = outcome.result.upper() if outcome.result == "failed" else outcome.result
        seconds = f"{outcome.seconds:.1f}" if outcome.result != "not run" else ""
        rows.append([outcome.name, result, seconds, _shorten(outcome.found)])
    return format_table(rows, left={0, 1, 3})


def plan_table(checks: Sequence[Check]) -> list[str]:
    """Return one line per check: what it shows, what it needs, and its share of the time."""
    rows = [["check", "needs", "seconds", "what it shows"]]
    rows += [[check.name, check.needs, f"{check.seconds:.0f}", check.shows] for check in checks]
    return format_table(rows, left={0, 1, 3})


def write_report(path: Path, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write everything as JSON; `about` says of which run."""
    passed = not any(outcome.result == "failed" for outcome in outcomes)
    content = {**about, "passed": passed, "checks": [asdict(outcome) for outcome in outcomes]}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(content, indent=2) + "\n")
    new.replace(path)


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDEST else line[: _WIDEST - 3] + "..."
