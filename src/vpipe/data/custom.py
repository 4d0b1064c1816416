"""The user's own data: a function named in the run's YAML makes the source."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpipe.config.entry import load_entry
from vpipe.data.bert.meta import Split
from vpipe.data.source import ArraySource, BatchSource
from vpipe.errors import ConfigError, DataError

__all__ = ["open_source"]


def open_source(
    entry: str, split: Split = "train", *, options: Mapping[str, Any] | None = None, base: Path | None = None
) -> BatchSource | None:
    """Call the function `entry` as `function(split, **options)` and return the source that it gives.

    `entry` is 'file.py:function', relative to `base`, or 'package.module:function'. The function returns a
    `BatchSource`, or a dictionary of arrays or tensors by field with samples along the first dimension; for
    `split='eval'` it may return None, which means that there is nothing to evaluate on. Errors raised inside the
    function are not caught.

    Raises:
        ConfigError: the function cannot be found, or does not take these options.
        DataError: what it returns is no source.
    """
    function = load_entry("data.entry", entry, base or ".")
    options = dict(options or {})
    try:
        inspect.signature(function).bind(split, **options)
    except TypeError as error:
        raise ConfigError(
            f"data.entry: {entry} cannot be called as function(split, **options) with options "
            f"{', '.join(options) or 'none'}: {error}; correct data.options or the function's parameters"
        ) from error
    made = function(split, **options)
    if isinstance(made, Mapping):
        return ArraySource(made)
    if made is None and split == "eval":
        return None
    if not isinstance(made, BatchSource):
        raise DataError(
            f"data.entry: {entry} returned {type(made).__name__} for split '{split}'; return a BatchSource "
            f"(fields, num_samples, batch) or a dictionary of arrays by field"
        )
    return made
