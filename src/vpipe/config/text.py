"""YAML and JSON text to plain values and back: numbers like 1e-3, keys given twice, errors with their line."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vpipe.errors import ConfigError

__all__ = ["format_yaml", "parse_json", "parse_yaml", "read_text", "with_text_keys"]

_FLOAT_TAG = "tag:yaml.org,2002:float"
# YAML 1.2 floats: PyYAML follows YAML 1.1, which reads 1e-3 (no dot, or no sign in the exponent) as a text.
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the repairs above; dates stay text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single word", key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Sections as blocks, lists on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] not in (_FLOAT_TAG, "tag:yaml.org,2002:timestamp")]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))
_Dumper.add_representer(list, _represent_list)


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        ConfigError: it is missing, a folder, not readable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def parse_yaml(text: str, where: str) -> Any:
    """Turn YAML text into plain values; `where` names its source in errors.

    Every key becomes text: YAML reads ``1: x`` as a number.

    Raises:
        ConfigError: a syntax error or a key given twice, with its line and column.
    """
    try:
        return with_text_keys(yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        whole = [error.context] if error.context and error.context.startswith("expected") else []
        raise ConfigError(f"{where}{place}: {' '.join([*whole, error.problem or str(error.context)])}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply, or an alias stands inside what it repeats") from None


def with_text_keys(value: Any) -> Any:
    """Copy nested values with every key as text."""
    if isinstance(value, Mapping):
        return {str(key): with_text_keys(item) for key, item in value.items()}
    return [with_text_keys(item) for item in value] if isinstance(value, list) else value


_STRING_OR_COMMENT = re.compile(r'("(?:[^"\\\n]|\\.)*")|//[^\n]*')


def parse_json(text: str, where: str) -> Any:
    """Turn JSON text into plain values; `where` names its source in errors.

    Comments from ``//`` to the end of the line are left out, as guides print such files with them.

    Raises:
        ConfigError: a syntax error, with its line and column.
    """
    try:
        return json.loads(_STRING_OR_COMMENT.sub(lambda found: found[1] or " " * len(found[0]), text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply") from None


def format_yaml(tree: Mapping[str, Any]) -> str:
    """Write plain values as YAML that `parse_yaml` reads back equal: sections as blocks, lists on one line."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
