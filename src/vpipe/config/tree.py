"""A run as plain nested values: what a YAML file and the overrides say, before anything is checked."""

from __future__ import annotations

from typing import Any

from vpipe.config.text import parse_yaml
from vpipe.errors import ConfigError

__all__ = ["Tree", "get_key", "parse_override", "remove_key", "set_key"]

Tree = dict[str, Any]
"""Nested values; a key in it is written 'section.key'."""


def get_key(tree: Tree, key: str) -> Any:
    """Return the value of 'section.key', or None when there is none."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def set_key(tree: Tree, key: str, value: Any) -> None:
    """Set 'section.key', making the mappings on the way."""
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[leaf] = value


def remove_key(tree: Tree, key: str) -> None:
    """Take 'section.key' out, where it is there."""
    section, _, leaf = key.rpartition(".")
    parent = get_key(tree, section)
    if isinstance(parent, dict):
        parent.pop(leaf, None)


def parse_override(override: str) -> tuple[str, Any]:
    """Read 'section.key=value', the value in YAML.

    Raises:
        ConfigError: no key, no equals sign, or a value that is not YAML.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override}: is not of the form key=value, e.g. train.batch_size=8")
    return key, parse_yaml(text, f"--set {override}")
