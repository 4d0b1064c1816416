"""The page on schedules: every picture, figure, formula and recommendation on it is what the simulator says."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vpipe.cli.schedule import command
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate
from vpipe.schedule.weights import weight_usage

ROOT = Path(__file__).parents[1]
PAGES = {"en": ROOT / "docs" / "schedules.md", "zh": ROOT / "docs" / "schedules.zh.md"}
IMAGES = ROOT / "docs" / "images" / "schedules"
Figures = Mapping[str, Any]  # what `--format json` says of one schedule


@dataclass(frozen=True)
class Section:
    """A rung (numbered) or a situation (lettered) of the page."""

    key: str
    """``7`` or ``C``."""
    title: str
    body: str

    @property
    def commands(self) -> list[str]:
        blocks = re.findall(r"```bash\n(.*?)```", self.body, re.DOTALL)
        return [line for block in blocks for line in block.splitlines()]

    @property
    def formulas(self) -> list[str]:
        return re.findall(r"^\$\$(.*)\$\$$", self.body, re.MULTILINE)

    @property
    def rows(self) -> list[list[str]]:
        return _table(self.body)


def _table(text: str) -> list[list[str]]:
    """Return the cells of the first table in `text`, without its heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@cache
def _page(language: str) -> str:
    return PAGES[language].read_text(encoding="utf-8")


@cache
def _sections(language: str) -> dict[str, Section]:
    found = {}
    for part in re.split(r"^### ", _page(language), flags=re.MULTILINE)[1:]:
        heading, body = re.split(r"\n", part, maxsplit=1)
        key, title = heading.split(". ", maxsplit=1)
        found[key] = Section(key, title, re.split(r"^## ", body, flags=re.MULTILINE)[0])
    return found


RUNGS = [section for key, section in _sections("en").items() if key.isdigit()]
SITUATIONS = [section for key, section in _sections("en").items() if key.isalpha()]


def _arguments(line: str) -> list[str]:
    """Return what follows ``vpipe schedule``, without the format and the file it is written to."""
    words = shlex.split(line.partition(" > ")[0].replace(" --format svg", ""))
    assert words[:2] == ["vpipe", "schedule"], line
    return words[2:]


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.output


@cache
def _figures(line: str) -> list[Figures]:
    """Return the figures of a printed command: one schedule, or those it compares."""
    data = json.loads(_run(*_arguments(line), "--format", "json"))
    return data if isinstance(data, list) else [data]


def _expected_row(figures: Figures, *, per_rank: bool) -> list[str]:
    """Return the cells behind the name: makespan, both bubbles, held, versions, staleness, traffic."""
    lists = [figures[key] for key in ("peak_activations", "weight_versions", "staleness")]
    return [
        f"{figures['makespan']:g}",
        f"{figures['bubble_fraction']:.2%}".replace("%", " %"),
        f"{figures['span_bubble_fraction']:.2%}".replace("%", " %"),
        *(" ".join(f"{number:g}" for number in (numbers if per_rank else [max(numbers)])) for numbers in lists),
        f"{figures['traffic']:.3g}",
    ]


@pytest.mark.parametrize("section", [*RUNGS, *SITUATIONS], ids=lambda section: section.title)
def test_figures_are_what_the_commands_say(section: Section) -> None:
    expected = [(line, figures) for line in section.commands for figures in _figures(line)]
    assert len(section.rows) == len(expected)
    for (name, *cells), (line, figures) in zip(section.rows, expected, strict=True):
        words = name.strip("`").split()
        assert words[0] == figures["schedule"]
        assert set(words[1:]) <= set(_arguments(line)), (name, line)
        assert cells == _expected_row(figures, per_rank=section in RUNGS), f"{line}: {name}"


@pytest.mark.parametrize("rung", RUNGS, ids=lambda section: section.title)
def test_pictures_are_what_the_commands_draw(rung: Section) -> None:
    line = rung.commands[0]
    shown = re.findall(r"!\[[^\]]+\]\((.*?)\)", rung.body)
    file = line.partition(" > ")[2]
    assert [f"docs/{path}" for path in shown] == [file]
    assert "--ranks 4 --microbatches 8" in line
    drawn = _run(*_arguments(line), "--format", "svg")
    assert (ROOT / file).read_text(encoding="utf-8") == drawn, f"draw it anew: {line}"


def test_every_picture_is_shown() -> None:
    assert {path.name for path in IMAGES.iterdir()} == {rung.commands[0].rpartition("/")[2] for rung in RUNGS}


def test_both_languages_have_the_same_rungs_commands_formulas_and_figures() -> None:
    english, chinese = _sections("en"), _sections("zh")
    assert list(english) == list(chinese)
    for key, section in english.items():
        other = chinese[key]
        assert other.commands == section.commands, key
        assert other.formulas == section.formulas, key
        assert other.rows == section.rows, key
        assert re.findall(r"!\[.*", other.body) == re.findall(r"!\[.*", section.body), key
        assert key.isalpha() or ("**When:** " in section.body and "**何时用" in other.body), key
    assert [re.findall(r"`(.*?)`", section.title) for section in chinese.values()] == [
        re.findall(r"`(.*?)`", section.title) for section in english.values()
    ]
    for mine, theirs in zip(_decisions("en"), _decisions("zh"), strict=True):
        assert (mine[0][:3], mine[2:]) == (theirs[0][:3], theirs[2:])


def test_figures_stand_in_tables_only() -> None:
    """What is not in a table or a formula is not checked, so it has no figures."""
    for language in PAGES:
        prose = [line for line in _page(language).splitlines() if not line.startswith(("|", "$$", "vpipe "))]
        assert not [line for line in prose if re.search(r"\d\s?%|\d\.\d", line)]


def test_pages_are_linked() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for path in PAGES.values():
        assert f"({path.name})" in index
    assert "(schedules.zh.md)" in _page("en")
    assert "(schedules.md)" in _page("zh")


# -- Which schedule should I use?


def _decisions(language: str) -> list[list[str]]:
    text = re.split(r"^## ", _page(language), flags=re.MULTILINE)[-1]
    return _table(text.partition("\n### ")[0])


def _time(figures: Figures) -> float:
    return float(figures["makespan"] / figures["num_microbatches"])


def _updates(figures: Figures) -> float:
    steps: int = sum("STEP" in action for action in figures["actions"][0])
    return float(steps * figures["num_ranks"] / (figures["num_stages"] * figures["num_microbatches"]))


def _costs(figures: Figures) -> tuple[float, ...]:
    """Return all that one wants little of."""
    worst = [max(figures[key]) for key in ("peak_activations", "weight_versions", "staleness")]
    return (_time(figures), *worst, figures["traffic"], -_updates(figures))


@pytest.mark.parametrize("row", _decisions("en"), ids=lambda row: row[1])
def test_decisions_are_backed_by_the_figures(row: list[str]) -> None:
    link, _, taken, *cells = row
    section = _sections("en")[link[1]]
    compared = [figures for line in section.commands for figures in _figures(line)]
    names = [figures["schedule"] for figures in compared]
    mine, plain = compared[names.index(taken.strip("`"))], compared[names.index("1f1b")]
    held, versions = (max(mine[key]) for key in ("peak_activations", "weight_versions"))
    expected = [_time(mine), held, versions, _time(plain), max(plain["peak_activations"])]
    assert cells == [f"{number:.4g}" for number in expected]
    assert _time(mine) <= _time(plain)
    same_work = _figures(section.commands[0]) if "--compare" in section.commands[0] else compared
    beaten_by = [
        other["schedule"]
        for other in same_work
        if _costs(other) != _costs(mine) and all(a <= b for a, b in zip(_costs(other), _costs(mine), strict=True))
    ]
    assert not beaten_by


@pytest.mark.parametrize("language", PAGES)
def test_the_decision_table_leads_to_the_commands(language: str) -> None:
    for link, *_ in _decisions(language):
        letter, anchor = re.fullmatch(r"\[(\w)\]\(#(.*)\)", link).groups()  # type: ignore[union-attr]
        title = f"{letter}. {_sections(language)[letter].title}".lower()
        assert anchor == re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
    assert {row[0][1] for row in _decisions(language)} == {section.key for section in SITUATIONS}


def test_what_the_text_says_of_the_situations() -> None:
    """Sentences that name a winner; the tables hold their figures."""
    by = {
        key: {figures["schedule"]: figures for line in reversed(section.commands) for figures in _figures(line)}
        for key, section in _sections("en").items()
        if key.isalpha()
    }
    time = {key: {name: figures["makespan"] for name, figures in group.items()} for key, group in by.items()}
    held = {
        key: {name: max(figures["peak_activations"]) for name, figures in group.items()} for key, group in by.items()
    }
    assert time["A"]["zb-v"] == time["A"]["dualpipe-v"] == min(time["A"].values())
    assert held["A"]["zb-v"] < held["A"]["dualpipe-v"]
    assert time["B"]["v-half"] < time["B"]["1f1b"]
    assert held["B"]["v-min"] < held["B"]["v-half"] < held["B"]["1f1b"]
    assert time["C"]["zb-h1"] == time["C"]["zb-h2"]
    assert held["C"]["zb-h1"] < held["C"]["zb-h2"]
    assert by["C"]["zb-h2"]["span_bubble_fraction"] < by["C"]["zb-h1"]["span_bubble_fraction"]
    assert time["D"]["looped-bfs"] == time["D"]["interleaved"]
    assert held["D"]["looped-bfs"] == by["D"]["looped-bfs"]["num_microbatches"]
    assert time["E"]["zb-v"] == time["E"]["zb-h1"]
    assert time["E"]["searched"] == min(time["E"].values())
    assert by["E"]["zb-v"]["traffic"] == 2 * by["E"]["zb-h1"]["traffic"]
    assert held["E"]["v-half"] == min(held["E"].values())
    assert time["F"]["1f1b"] == min(time["F"].values())
    assert min(time["G"]["v-half"], time["G"]["v-min"]) > time["G"]["1f1b"]
    assert set(sorted(time["G"], key=lambda name: time["G"][name])[:2]) == {"zb-h2", "gpipe"}
    eager = _figures(_sections("en")["G"].commands[1])[0]["makespan"]
    assert eager < time["G"]["1f1b"]
    unequal, even = (_figures(line) for line in _sections("en")["H"].commands)
    assert even[0]["makespan"] < min(figures["makespan"] for figures in unequal)
    assert held["H"]["v-half"] == min(held["H"].values())
    assert time["H"]["v-half"] == min(figures["makespan"] for figures in unequal)
    assert {name for name in held["J"] if held["J"][name] <= 3} == {"v-half", "searched"}
    assert time["J"]["searched"] < time["J"]["v-half"]


# -- Formulas


def _python(formula: str) -> str:
    r"""Turn LaTeX such as ``\frac{(p-1)F}{2}`` into Python: ``(((p-1)*F)/(2))``."""
    for name in ("floor", "ceil"):
        formula = formula.replace(rf"\l{name}", f"{name}(").replace(rf"\r{name}", ")")
    formula = formula.replace(r"\min", "min").replace("d_0", "d0").replace(r"\sum_{k<r} F_k", "S")
    formula = re.sub(r"([FB])_r", r"\1", formula)
    while r"\frac" in formula:
        formula, count = re.subn(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", formula)
        assert count, formula
    tokens: list[str] = re.findall(r"floor|ceil|min|d0|[A-Za-z]|\d+|\S", formula)
    text = tokens[0]
    for before, token in pairwise(tokens):
        operand = before not in ("floor", "ceil", "min") and (before.isalnum() or before == ")")
        text += ("*" if operand and (token.isalnum() or token == "(") else "") + token
    return text


def _evaluate(formula: str, values: Mapping[str, float]) -> float:
    tools = {"floor": math.floor, "ceil": math.ceil, "min": min}
    return float(eval(_python(formula), {"__builtins__": {}}, {**tools, **values}))


def test_latex_is_read() -> None:
    assert _python(r"\frac{2(p-1)(F+B)}{3}") == "((2*(p-1)*(F+B))/(3))"
    assert _evaluate(r"(p-1-s) \lceil 1 + \frac{2L}{F+B} \rceil", {"p": 4, "s": 1, "L": 1, "F": 1, "B": 2}) == 4
    assert _evaluate(r"\min(p-r, m)", {"p": 4, "r": 3, "m": 9}) == 1
    assert _evaluate(r"\lfloor \frac{p+2}{2} \rfloor", {"p": 5}) == 3


def _parts(rung: Section) -> Iterator[tuple[str, str, str]]:
    """Return the equations of a rung: left side, relation, right side."""
    (line,) = rung.formulas
    for part in line.split(r"\qquad"):
        left, relation, right = re.split(r"(=|\\[lg]e )", part.strip(), maxsplit=1)
        yield left.strip(), relation.strip(), right.strip()


def _sizes() -> Iterator[tuple[int, int]]:
    return ((p, m) for p in range(2, 7) for m in (2 * p, 3 * p, 4 * p))


def _depths(rung: Section, values: Mapping[str, float]) -> list[int]:
    """Return the depth of each stage by the rung's own formula; none if it has no such formula."""
    formula = next((right for left, _, right in _parts(rung) if left == "d_s"), None)
    stages = range(int(values["p"])) if formula is not None else ()
    return [int(_evaluate(str(formula), {**values, "s": stage})) for stage in stages]


def _build(rung: Section, values: Mapping[str, float], depths: list[int]) -> Schedule:
    options: dict[str, Any] = {"depths": depths} if depths else {}
    if "--vertical-sync" in rung.commands[0]:
        options["vertical_sync"] = True
    name = rung.commands[0].split()[2]
    return build_schedule(name, int(values["p"]), int(values["m"]), **options)


def _measure(schedule: Schedule, costs: Costs) -> dict[str, list[float]]:
    """Return what the left sides stand for: one number, or one for each rank or stage."""
    simulation = simulate(schedule, costs)
    usage = weight_usage(schedule)
    own = [
        events[-1].end - events[0].start - work for events, work in zip(simulation.events, simulation.work, strict=True)
    ]
    return {
        r"T_{\text{idle}}": [simulation.makespan - max(simulation.work)],
        r"T_{\text{own}}": [max(own)],
        "A": [max(peak_activations(schedule))],
        "A_r": list(peak_activations(schedule)),
        "V_s": [stage.num_versions for stage in usage],
        "D_s": [max(stage.staleness) for stage in usage],
    }


NOT_EVALUATED = ("w_{t+1}", "d_s")  # the rule of the update, and what `_build` uses
HOLDS: dict[str, Callable[[float, float], bool]] = {
    "=": lambda measured, formula: math.isclose(measured, formula, abs_tol=1e-9),
    r"\le": lambda measured, formula: measured <= formula + 1e-9,
}
EQUAL = [(1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 0.5)]
"""F, I, W, and the time of a message where the rung has one."""
UNEQUAL = (2.0, 3.0, 1.0, 2.0)
FROM_ZB_H2 = range(8, 13)
"""Rungs whose formulas hold for F = I = W only."""


@pytest.mark.parametrize("rung", RUNGS[:-1], ids=lambda section: section.title)
def test_formulas_hold(rung: Section) -> None:
    checked = 0
    for forward, input_grad, weight_grad, latency in EQUAL if int(rung.key) in FROM_ZB_H2 else [*EQUAL, UNEQUAL]:
        for p, m in _sizes():
            values: dict[str, float] = {"p": p, "m": m, "v": 2, "F": forward, "I": input_grad, "W": weight_grad}
            values |= {"B": input_grad + weight_grad, "L": latency}
            depths = _depths(rung, values)
            values["d0"] = next(iter(depths), 0)
            schedule = _build(rung, values, depths)
            costs = Costs.from_rank_shares(
                schedule.placement,
                forward=forward,
                input_grad=input_grad,
                weight_grad=weight_grad,
                latency=latency if "--latency" in rung.commands[0] else 0.0,
            )
            measured = _measure(schedule, costs)
            for left, relation, right in _parts(rung):
                if left in NOT_EVALUATED:
                    continue
                for place, number in enumerate(measured[left]):
                    formula = _evaluate(right, {**values, "r": place, "s": place})
                    assert HOLDS[relation](number, formula), (left, right, values, place, number, formula)
                    checked += 1
    assert checked


@pytest.mark.parametrize("slow", range(4))
def test_no_order_is_shorter_than_the_bound(slow: int) -> None:
    """The formula of the last rung; a slow last rank comes closest to it."""
    ((left, relation, formula),) = _parts(RUNGS[-1])
    assert (left, relation) == ("T", r"\ge")
    times = [3.0 if rank == slow else 1.0 for rank in range(4)]
    costs: dict[str, Any] = {"forward": times, "input_grad": times, "weight_grad": times}
    schedule = build_schedule("searched", 4, 8, **costs)
    makespan = simulate(schedule, Costs.from_rank_shares(schedule.placement, **costs)).makespan
    bounds = [
        _evaluate(
            formula, {"v": schedule.placement.stages_per_rank, "m": 8, "S": sum(times[:rank]), "F": time, "B": 2 * time}
        )
        for rank, time in enumerate(times)
    ]
    assert max(bounds) <= makespan < 1.1 * max(bounds)


def test_rungs_are_families_in_the_registry_s_order() -> None:
    names = [rung.commands[0].split()[2] for rung in RUNGS]
    *made, last = names
    assert last == "searched"
    assert made == sorted(made, key=list(SCHEDULES).index)
