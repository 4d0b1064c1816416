"""From a YAML file, overrides and the files it names to one checked `RunConfig`, and back to YAML."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vpipe.config.checks.run import check_config
from vpipe.config.checks.told import tell_schedule
from vpipe.config.fields import show
from vpipe.config.original.flat import FLAT_KEYS, Translation, translate
from vpipe.config.paths import make_paths_absolute
from vpipe.config.problems import Problem, raise_problems, sections, validate_tree, without
from vpipe.config.renamed import present_name, take_old_names
from vpipe.config.resolve import read_initial_model, read_partition, resolve_run
from vpipe.config.run import RunConfig
from vpipe.config.text import format_yaml, parse_yaml, read_text, with_text_keys
from vpipe.config.tree import Tree, get_key, parse_override, set_key
from vpipe.errors import ConfigError

__all__ = ["LoadedConfig", "build_config", "dump_config", "load_config", "read_config"]

_LOGGER = logging.getLogger(__name__)


class LoadedConfig(NamedTuple):
    """A run, and what its author should know about it although it is legal."""

    config: RunConfig
    warnings: tuple[str, ...]


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run's YAML file, native or in the original's flat form; warnings go to the log.

    Relative paths in it, and in `overrides` too, start from the file's folder.

    Args:
        path: the YAML file.
        overrides: 'section.key=value' or 'flat_key=value' each, values in YAML; the last one wins.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    config, warnings = read_config(path, overrides)
    for warning in warnings:
        _LOGGER.warning("%s: %s", path, warning)
    return config


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> LoadedConfig:
    """Do what `load_config` does, and return the warnings with the run.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    path = Path(path)
    content = parse_yaml(read_text(path), str(path))
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: is not a mapping of keys to values, but {show(content)}")
    return _build(content, path.absolute().parent, overrides, str(path))


def build_config(
    content: Mapping[str, Any], folder: str | Path = ".", overrides: Iterable[str] = (), where: str = "config"
) -> RunConfig:
    """Make a run from plain values as a YAML file would hold them; otherwise like `load_config`, without the log.

    Args:
        content: native sections or flat keys.
        folder: the folder that relative paths start from.
        overrides: as in `load_config`.
        where: how errors call `content`.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    return _build(content, Path(folder).absolute(), overrides, where).config


def dump_config(config: RunConfig) -> str:
    """Write a run as YAML with every key, such that `load_config` gives an equal run."""
    return format_yaml(config.model_dump(mode="json"))


def _build(content: Mapping[Any, Any], folder: Path, overrides: Iterable[str], where: str) -> LoadedConfig:
    flat, tree = _split(with_text_keys(content))
    problems, warnings = take_old_names(tree)
    changes = [parse_override(override) for override in overrides]
    flat_changes = {key: value for key, value in changes if key in FLAT_KEYS}
    translation = translate(flat | flat_changes, tree, folder)
    problems += [*translation.problems, *_merge(tree, translation, flat_changes)]
    for key, value in changes:
        if key not in FLAT_KEYS:
            present, renamed = present_name(key)
            set_key(tree, present, value)
            warnings += renamed
    old_problems, old_warnings = take_old_names(tree)  # an override may be a whole section
    make_paths_absolute(tree, folder)
    file_problems, file_warnings = read_partition(tree)
    file_problems += read_initial_model(tree)
    run, broken = validate_tree(tree, FLAT_KEYS, is_flat=bool(flat))
    run, run_warnings = resolve_run(run, tree, bool(flat))
    problems += [*old_problems, *file_problems, *broken]
    problems += without(check_config(run), problems)
    raise_problems(problems, where, translation.origins)
    is_given = get_key(tree, "pipeline.num_microbatches") is not None
    run_warnings += tell_schedule(run, is_given=is_given, is_flat=bool(flat))
    return LoadedConfig(run, (*translation.warnings, *warnings, *old_warnings, *file_warnings, *run_warnings))


def _split(content: dict[str, Any]) -> tuple[dict[str, Any], Tree]:
    """Part flat keys from native sections; a section without content is an empty one."""
    names = sections()
    flat = {key: value for key, value in content.items() if key in FLAT_KEYS}
    native = {key: {} if value is None and key in names else value for key, value in content.items() if key not in flat}
    return flat, native


def _merge(tree: Tree, translation: Translation, overrides: Mapping[str, Any]) -> list[Problem]:
    """Put translated flat keys among the native ones; a setting that the file gives in both forms is a mistake.

    What a flat key only implies yields to a native key; an override yields to nothing.
    """
    problems = []
    for key, (value, source) in translation.settings.items():
        native = get_key(tree, key)
        if native is None or source in overrides:
            set_key(tree, key, value)
        elif translation.origins.get(key) == source and native != value:
            problems.append(Problem((key,), f"{source} and {key} are the same setting, given twice; keep one"))
            del translation.origins[key]
    return problems
