"""Paths in a run's file: they start from the file's folder."""

from __future__ import annotations

import os
from pathlib import Path

from vpipe.config.tree import Tree, get_key, set_key
from vpipe.schedule.csv_file import is_csv_file

__all__ = ["PARTITIONS", "absolute", "is_file_name", "make_paths_absolute"]

PARTITIONS = ("auto", "uniform", "parameters", "compute")
"""Cuts that have a name; any other word is that of a file."""
_PATHS = ("log_directory", "data.data_dir", "model.init_from", "plan.swap_directory")
_ENTRIES = ("model.entry", "data.entry")


def absolute(name: str, folder: Path) -> str:
    """Let a relative path start from `folder`, a leading ~ from the user's home."""
    return str((folder / os.path.expanduser(name)).resolve())


def is_file_name(partition: object) -> bool:
    """Tell whether a partition is the name of a JSON file."""
    return isinstance(partition, str) and partition not in PARTITIONS


def make_paths_absolute(tree: Tree, folder: Path) -> None:
    """Let the relative paths of a run start from `folder`: folders, and files of entries, partition and schedule."""
    tree.setdefault("log_directory", "runs")
    for key in _PATHS:
        value = get_key(tree, key)
        if isinstance(value, str):
            set_key(tree, key, absolute(value, folder))
    for key in _ENTRIES:
        value = get_key(tree, key)
        file, _, function = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        if file.endswith(".py"):
            set_key(tree, key, f"{absolute(file, folder)}:{function}")
    partition = get_key(tree, "plan.partition")
    if is_file_name(partition):
        set_key(tree, "plan.partition", absolute(partition, folder))
    schedule = get_key(tree, "pipeline.schedule")
    if isinstance(schedule, str) and is_csv_file(schedule):
        set_key(tree, "pipeline.schedule", absolute(schedule, folder))
