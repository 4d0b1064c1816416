"""What is wrong with a run: pydantic's findings in our words, gathered so that all are told at once."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from vpipe.config.fields import describe_field, show
from vpipe.config.run import RunConfig
from vpipe.config.sections import Section
from vpipe.config.tree import Tree
from vpipe.errors import ConfigError
from vpipe.words.near import did_you_mean, nearest

__all__ = ["Problem", "native_keys", "raise_problems", "sections", "validate_tree", "without"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the keys it is about, as 'section.key', and one line that says it."""

    keys: tuple[str, ...]
    text: str


def sections() -> dict[str, type[Section]]:
    """Return the sections by name."""
    annotations = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    return {name: kind for name, kind in annotations.items() if isinstance(kind, type) and issubclass(kind, Section)}


def native_keys() -> list[str]:
    """List every key of a run as 'section.key', in the order of the reference."""
    kinds = sections()
    return [
        key
        for name in RunConfig.model_fields
        for key in ([f"{name}.{field}" for field in kinds[name].model_fields] if name in kinds else [name])
    ]


def raise_problems(problems: Iterable[Problem], where: str, origins: Mapping[str, str]) -> None:
    """Raise one `ConfigError` with a line per problem, or return when there is none.

    `origins` gives the flat key that the user wrote for a native one; messages then use it.

    Raises:
        ConfigError: there is at least one problem.
    """
    lines = list(dict.fromkeys(_rename(problem.text, origins) for problem in problems))
    if len(lines) == 1:
        raise ConfigError(f"{where}: {lines[0]}")
    if lines:
        raise ConfigError("\n  ".join([f"{where}: {len(lines)} errors", *lines]))


def validate_tree(
    tree: Tree, vocabulary: Iterable[str] = (), *, is_flat: bool = False
) -> tuple[RunConfig, list[Problem]]:
    """Turn plain values into a run; broken ones are reported and replaced by their defaults.

    `vocabulary` holds further keys that may be suggested at top level, beside the native ones; a file that `is_flat`
    has such keys, so there they are listed where none is near.
    """
    try:
        return RunConfig.model_validate(tree), []
    except ValidationError as error:
        places = dict.fromkeys(tuple(str(part) for part in item["loc"][:2]) for item in error.errors())
    healthy = copy.deepcopy(tree)
    problems = [_problem(tree, place, list(vocabulary), is_flat=is_flat) for place in places]
    for place in places:
        _remove(healthy, place)
    return RunConfig.model_validate(healthy), problems


def _rename(text: str, origins: Mapping[str, str]) -> str:
    if not origins:
        return text
    names = "|".join(re.escape(key) for key in sorted(origins, key=len, reverse=True))
    return re.sub(rf"(?<![\w.])({names})(?!\w|\.\w)", lambda match: origins[match[1]], text)


def _problem(tree: Tree, place: tuple[str, ...], vocabulary: list[str], *, is_flat: bool) -> Problem:
    """Say what is wrong at `place`, the path of a key that pydantic refused."""
    key, value = ".".join(place), tree[place[0]]
    if len(place) > 1:
        value = value[place[1]]
    kinds = sections()
    fields = kinds[place[0]].model_fields if len(place) > 1 else RunConfig.model_fields
    if place[-1] not in fields:
        return Problem(
            (key,), f"{key} = {show(value)} is not a known key{_suggest(place, vocabulary, is_flat=is_flat)}"
        )
    if len(place) == 1 and place[0] in kinds:
        inside = tuple(f"{key}.{field}" for field in kinds[key].model_fields)
        return Problem(inside, f"{key} = {show(value)} is not a section; write its keys below it, e.g. {inside[0]}")
    expected = describe_field(fields[place[-1]])
    near = did_you_mean(value, re.findall(r"'(\w+)'", expected)) if isinstance(value, str) else ""
    return Problem((key,), f"{key} = {show(value)} is not {expected}{near}")


def _suggest(place: tuple[str, ...], vocabulary: list[str], *, is_flat: bool) -> str:
    """Suggest a key for an unknown one: a like name in its own section, else a like name elsewhere, else list them.

    At top level a key of the file's own form, native or flat, goes before one of the other.
    """
    leaf, kinds = place[-1], sections()
    here = list(kinds[place[0]].model_fields) if len(place) > 1 else [*RunConfig.model_fields, *vocabulary]
    own_form = vocabulary if is_flat else RunConfig.model_fields
    near = did_you_mean(leaf, own_form) if len(place) == 1 else ""
    if near := near or did_you_mean(leaf, here):
        return near
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(native_keys())}
    if (close := nearest(leaf, elsewhere, cutoff=0.75)) is not None:
        return f"; did you mean '{elsewhere[close]}'?"
    return f"; known here: {', '.join(here if len(place) > 1 or is_flat else RunConfig.model_fields)}"


def _remove(tree: Tree, place: tuple[str, ...]) -> None:
    parent = tree[place[0]] if len(place) > 1 else tree
    parent.pop(place[-1], None)


def without(problems: Iterable[Problem], broken: Iterable[Problem]) -> list[Problem]:
    """Leave out problems about a key that is reported as broken already: its value there is only the default."""
    keys = {key for problem in broken for key in problem.keys}
    if keys & {"plan.partition", "launch.machines", "pipeline.stages_per_rank"}:
        keys.add("pipeline.num_ranks")  # which may have been counted from them
    return [problem for problem in problems if not keys.intersection(problem.keys)]
