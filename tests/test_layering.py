"""The rooms of the house: imports point down only, and every module keeps the house's manners."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "vpipe"
MAX_LINES = 400

# Lowest first. A room imports from itself and from earlier rows; rooms of one row do not know each other.
ROWS = (
    ("errors", "_version"),
    ("schedule",),
    ("plan",),
    ("config",),
    ("model", "data"),
    ("runtime",),
    ("report",),
    ("train", "launch"),
    ("cli",),
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
ENTRANCES = {"vpipe", "vpipe.__main__"}  # the public names and `python -m vpipe` look at every room
WITHOUT_TORCH = {"errors", "_version", "config", "schedule", "plan"}
MAY_USE_TORCH = {"vpipe.plan.profile"}


def _module_name(path: Path) -> str:
    parts = ["vpipe", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {_module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, also those inside functions; `from vpipe import x` gives vpipe.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import; write the full name"
            source = node.module or ""
            names = [f"vpipe.{alias.name}" for alias in node.names] if source == "vpipe" else [source]
            yield from ((node.lineno, name) for name in names)


def _import_fault(module: str, imported: str) -> str | None:
    room, top = _room(module), imported.split(".")[0]
    if top == "torch" and room in WITHOUT_TORCH and module not in MAY_USE_TORCH:
        return f"{room} works without torch"
    if room == "schedule" and top != "vpipe" and top not in sys.stdlib_module_names:
        return f"schedule uses the standard library only, not {top}"
    if top != "vpipe":
        return None
    target = _room(imported)
    if target not in ROW_OF:
        return f"'{imported}' is no room; import the module that defines the name"
    if room == "schedule" and target not in ("schedule", "errors"):
        return f"schedule knows only errors, not {target}"
    if target != room and ROW_OF[target] >= ROW_OF[room]:
        return f"{room} may not know {target}: imports point down only"
    return None


def faults(module: str, source: str) -> list[str]:
    """Return what is wrong with one module's source, as `module:line: reason`."""
    tree = ast.parse(source)
    found = []
    if ast.get_docstring(tree) is None:
        found.append(f"{module}:1: no module docstring")
    if (num_lines := source.count("\n")) > MAX_LINES:
        found.append(f"{module}:{MAX_LINES}: {num_lines} lines, more than {MAX_LINES}; which two ideas are in it?")
    if module not in ENTRANCES:
        if _room(module) not in ROW_OF:
            return [*found, f"{module}:1: '{_room(module)}' is no room; give it a row in {Path(__file__).name}"]
        reasons = ((line, _import_fault(module, name)) for line, name in _imports(tree, module))
        found += [f"{module}:{line}: {reason}" for line, reason in reasons if reason]
    if _room(module) != "cli":
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
        found += [f"{module}:{call.lineno}: only cli prints" for call in calls if call.func.id == "print"]
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_module_keeps_the_rules(module: str) -> None:
    assert faults(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "line", "reason"),
    [
        ("vpipe.schedule.gpipe", "import numpy", "standard library only"),
        ("vpipe.schedule.gpipe", "from vpipe.config import RunConfig", "knows only errors"),
        ("vpipe.schedule", "def f():\n    import torch", "without torch"),
        ("vpipe.plan.cost", "import torch.nn", "without torch"),
        ("vpipe.model.chain", "from vpipe.runtime.stage import Stage", "imports point down only"),
        ("vpipe.model.bert", "from vpipe.data.bert import read", "imports point down only"),
        ("vpipe.runtime.stage", "from vpipe import train", "imports point down only"),
        ("vpipe.runtime.stage", "from vpipe import Chain", "is no room"),
        ("vpipe.errors", "import vpipe.config", "imports point down only"),
        ("vpipe.runtime.stage", "print('hello')", "only cli prints"),
        ("vpipe.attic", "x = 1", "is no room"),
        ("vpipe.runtime.stage", "\n" * MAX_LINES, "more than 400"),
    ],
)
def test_broken_rules_are_found(module: str, line: str, reason: str) -> None:
    found = faults(module, f'"""A module."""\n{line}\n')
    assert len(found) == 1
    assert reason in found[0]


def test_missing_docstring_is_found() -> None:
    assert faults("vpipe.errors", "x = 1\n") == ["vpipe.errors:1: no module docstring"]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("vpipe.plan.profile", "import torch"),
        (
            "vpipe.schedule.gpipe",
            "import heapq\nfrom vpipe.errors import ScheduleError\nfrom vpipe.schedule.action import Action",
        ),
        ("vpipe.config", "import pydantic\nfrom vpipe.errors import ConfigError"),
        ("vpipe.cli.train", "from vpipe.launch.local import launch\nprint('done')"),
    ],
)
def test_good_modules_pass(module: str, line: str) -> None:
    assert faults(module, f'"""A module."""\n{line}\n') == []
