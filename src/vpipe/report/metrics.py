"""What a run says about itself while it goes on: lines of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

__all__ = ["MetricsWriter", "finite"]


class MetricsWriter:
    """Appends records to a file of one JSON object per line; a reader sees each one as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()

    def write(self, record: Mapping[str, object]) -> None:
        """Write one record; JSON has no NaN and no infinity, so such values become null."""
        self._file.write(json.dumps({key: finite(value) for key, value in record.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def finite(value: object) -> object:
    """Return the value, or None for NaN and infinity, which JSON does not have; in a dictionary, too."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
