"""The rooms of the house: imports point down only, and every module keeps the house's manners."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "vpipe"
MAX_LINES = 400
MAX_MODULES = 16

# Lowest first. A room imports from itself and from earlier rows; rooms of one row do not know each other.
ROWS = (
    ("errors", "_version"),
    ("words",),
    ("schedule",),
    ("draw",),
    ("plan",),
    ("planner",),
    ("config",),
    ("data",),
    ("model",),
    ("runtime",),
    ("report",),
    ("workload",),
    ("measure", "launch"),
    ("train",),
    ("verify",),
    ("cli",),
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
# The parts of a room, lowest first: files and folders directly inside it. Parts of one row do not know each other, but
# for the single files of a row. A folder whose room is not listed here would be a fault.
INSIDE: dict[str, tuple[tuple[str, ...], ...]] = {
    "schedule": (
        ("action", "placement", "schedule", "weights", "memory", "traffic", "problem", "entry"),
        ("families", "simulate"),
        ("passes",),
        ("proof",),
        ("csv_form", "csv_file", "csv_torch"),
        ("search",),
        ("registry",),
    ),
    "config": (
        ("text", "tree", "entry", "model_sizes", "fields", "sections", "run", "problems", "paths"),
        ("planning",),
        ("checks",),
        ("original",),
        ("renamed", "taken_plan", "resolve", "reference", "load"),
    ),
    "model": (
        (
            "modes",
            "rng",
            "nested",
        ),
        ("losses",),
        (
            "block",
            "loss",
            "copying",
            "infer",
            "initialise",
            "modules",
            "chain",
            "emulated",
            "pretrained",
        ),
        ("families",),
        ("export", "zoo"),
    ),
    "data": (
        ("progress", "draws", "order", "source", "store"),
        ("text",),
        ("bert",),
        ("batches", "causal", "custom", "synthetic"),
    ),
    "runtime": (
        ("hooks", "torch_log", "trace", "status"),
        ("memory",),
        ("comm",),
        ("stage",),
        ("weights",),
        (
            "memory_watch",
            "batch",
            "feed",
            "programs",
            "executor",
            "assembly",
            "crossings",
            "arguments",
            "evaluation",
            "result",
        ),
        ("pipeline",),
    ),
    "report": (
        (
            "trace",
            "timeline",
            "link_fit",
            "bubble",
            "metrics",
            "measured_costs",
            "prediction",
            "prediction_of_run",
            "summary",
        ),
        ("sweep",),
    ),
    "measure": (
        ("trial", "gather", "copies", "alike", "cache", "times", "footprint", "links", "blocks"),
        ("count",),
        ("profile",),
    ),
    "planner": (("profile",), ("cost",), ("cut",), ("search",), ("estimate",), ("explain",)),
}
ENTRANCES = {"vpipe", "vpipe.__main__"}  # the public names and `python -m vpipe` look at every room
WITHOUT_TORCH = {"errors", "_version", "config", "draw", "plan", "planner", "schedule", "words"}
# What takes long to import, and the modules that import it (or what imports it) inside a function, so that a command
# or a model that does without it answers at once. Nobody else imports inside a function.
HEAVY = {"huggingface_hub", "matplotlib", "numpy", "pydantic", "pytorch_optimizer", "rich", "tokenizers", "torch"}
HEAVY |= {"transformers"}
# Private names of torch and of NamedTuple that classes here use for themselves, too.
# Functions of more than eight parameters, and why a value would not do.
MAX_PARAMETERS = 8
WIDE = {
    "vpipe.cli.plan.command": "a command has a parameter for each of its options",
    "vpipe.launch.local.launch_local": "one call starts, watches and ends a run",
    "vpipe.planner.estimate.estimate.estimate": "what a caller may leave out, by name, as in a request",
    "vpipe.runtime.executor.Executor.__init__": "the parts of a pipeline that an action may need, each used as it is",
    "vpipe.runtime.pipeline.Pipeline.__init__": "the front door: each argument is a value of its own",
    "vpipe.schedule.search.searched.build_searched": "a builder's keyword parameters are its options",
    "vpipe.schedule.simulate.costs.Costs.from_rank_shares": "the fields of Costs, each split over the stages of a rank",
}
FOREIGN = {"_buffers", "_fields", "_modules", "_replace", "_version"}
LAZY = {
    "vpipe.cli.data",
    "vpipe.cli.estimate",
    "vpipe.cli.profiling",
    "vpipe.cli.progress",
    "vpipe.cli.simulate",
    "vpipe.cli.sweep",
    "vpipe.cli.train",
    "vpipe.cli.verify",
    "vpipe.model.zoo",
    "vpipe.workload.optim",
}


def _module_name(path: Path) -> str:
    parts = ["vpipe", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {_module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
FOLDERS = {
    room.name: {path.name for path in room.iterdir() if path.is_dir() and path.name != "__pycache__"}
    for room in PACKAGE.iterdir()
    if room.is_dir()
}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name of the module) of every import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import; write the full name"
            source = node.module or ""
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield node.lineno, inner if source == "vpipe" or inner in SOURCES else source


def _part(module: str) -> str:
    """Return the file or folder of a room that a module stands in; the room's own `__init__` is its highest part."""
    return module.split(".")[2] if module.count(".") > 1 else ""


def _row_inside(module: str) -> int | None:
    rows = INSIDE.get(_room(module), ())
    if not _part(module):
        return len(rows)
    return next((row for row, parts in enumerate(rows) if _part(module) in parts), None)


def _inside_fault(module: str, imported: str) -> str | None:
    """Say why a module may not import another of its own room."""
    rows, row, target = INSIDE[_room(module)], _row_inside(module), _row_inside(imported)
    if row is None or target is None or _part(module) == _part(imported):
        return None
    if target > row:
        return f"{_part(module) or _room(module)} may not know {_part(imported)}: imports point down inside a room, too"
    if target == row and any(part in FOLDERS[_room(module)] for part in (_part(module), _part(imported))):
        return f"{_part(module)} and {_part(imported)} stand side by side in {rows[row]}: they do not know each other"
    return None


def _import_fault(module: str, imported: str) -> str | None:
    room, top = _room(module), imported.split(".")[0]
    if top == "torch" and room in WITHOUT_TORCH:
        return f"{room} works without torch"
    if room == "schedule" and top != "vpipe" and top not in sys.stdlib_module_names:
        return f"schedule uses the standard library only, not {top}"
    if top != "vpipe":
        return None
    target = _room(imported)
    if target not in ROW_OF:
        return f"'{imported}' is no room; import the module that defines the name"
    if room == "schedule" and target not in ("schedule", "errors", "words"):
        return f"schedule knows only errors and words, not {target}"
    if target != room and ROW_OF[target] >= ROW_OF[room]:
        return f"{room} may not know {target}: imports point down only"
    return _inside_fault(module, imported) if target == room and room in INSIDE else None


def _private_faults(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Yield where a module uses a private name of another: imports it, or reaches into another's object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vpipe"):
            for alias in node.names:
                if alias.name.startswith("_") and not alias.name.startswith("__"):
                    yield node.lineno, f"'{alias.name}' is private to {node.module}"
        elif isinstance(node, ast.Attribute) and module not in (owners := PRIVATE.get(node.attr, {module})):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls"):
                yield node.lineno, f"'{owner}.{node.attr}' is private to {', '.join(sorted(owners))}"


def _private_names(tree: ast.AST) -> Iterator[str]:
    """Yield the private attributes and methods that the classes of a module define."""
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(owner):
            if isinstance(node, ast.FunctionDef):
                name = node.name
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                name = node.attr if isinstance(node.value, ast.Name) and node.value.id == "self" else ""
            else:
                continue
            if name.startswith("_") and not name.startswith("__"):
                yield name


def _lazy_imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        yield from _imports(function, module)


def _top_level_imports(module: str) -> set[str]:
    body = ast.parse(SOURCES[module]).body
    found = {
        name for node in body if isinstance(node, ast.Import | ast.ImportFrom) for _, name in _imports(node, module)
    }
    # Importing a module runs the `__init__` of every folder above it.
    return {".".join(name.split(".")[:end]) for name in found for end in range(1, name.count(".") + 2)}


@cache
def _is_heavy(name: str) -> bool:
    """Return whether importing `name` takes long: it is heavy itself, or imports what is."""
    seen, waiting = set(), [name]
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        if name.split(".")[0] in HEAVY:
            return True
        waiting += _top_level_imports(name) if name in SOURCES else ()
    return False


def _lazy_fault(module: str, imported: str) -> str | None:
    if module not in LAZY:
        return "imports stand at the top; what only some callers need and takes long is listed in LAZY"
    return None if _is_heavy(imported) else f"{imported} is quick to import: it stands at the top"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, each sorted; none where imports go one way."""
    reached: dict[str, set[str]] = {}
    for module in graph:
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        reached[module] = seen & graph.keys()
    found = {tuple(sorted(other for other in seen if module in reached[other])) for module, seen in reached.items()}
    return [list(circle) for circle in sorted(found) if circle]


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
        reasons = [(line, _import_fault(module, name)) for line, name in _imports(tree, module)]
        reasons += [(line, _lazy_fault(module, name)) for line, name in _lazy_imports(tree, module)]
        reasons += _private_faults(tree, module)
        found += [f"{module}:{line}: {reason}" for line, reason in reasons if reason]
    if _room(module) != "cli":
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
        found += [f"{module}:{call.lineno}: only cli prints" for call in calls if call.func.id == "print"]
    return found


PRIVATE: dict[str, set[str]] = {}
for _module, _source in SOURCES.items():
    for _name in set(_private_names(ast.parse(_source))) - FOREIGN:
        PRIVATE.setdefault(_name, set()).add(_module)


@pytest.mark.parametrize("module", SOURCES)
def test_module_keeps_the_rules(module: str) -> None:
    assert faults(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "line", "reason"),
    [
        ("vpipe.schedule.families.gpipe", "import numpy", "standard library only"),
        ("vpipe.schedule.families.gpipe", "from vpipe.config import RunConfig", "knows only errors and words"),
        ("vpipe.schedule", "import torch", "without torch"),
        ("vpipe.planner.cost", "import torch.nn", "without torch"),
        ("vpipe.model.chain", "from vpipe.runtime.stage.stage import Stage", "imports point down only"),
        ("vpipe.data.source", "from vpipe.model.chain import Chain", "imports point down only"),
        ("vpipe.runtime.stage.stage", "from vpipe import train", "imports point down only"),
        ("vpipe.runtime.stage.stage", "from vpipe import Chain", "is no room"),
        ("vpipe.errors", "import vpipe.config", "imports point down only"),
        ("vpipe.runtime.stage.stage", "print('hello')", "only cli prints"),
        ("vpipe.runtime.executor", "from vpipe.runtime.weights.weights import _hidden", "'_hidden' is private"),
        (
            "vpipe.runtime.stage.stage",
            "def f(x):\n    return x._groups",
            "'x._groups' is private to vpipe.runtime.comm.transport",
        ),
        ("vpipe.runtime.stage.stage", "def f():\n    import torch", "imports stand at the top"),
        ("vpipe.model.zoo", "def f():\n    from vpipe.errors import ConfigError", "quick to import"),
        ("vpipe.schedule.simulate.costs", "import vpipe.schedule.registry", "imports point down inside a room, too"),
        ("vpipe.attic", "x = 1", "is no room"),
        ("vpipe.runtime.stage.stage", "\n" * MAX_LINES, "more than 400"),
    ],
)
def test_broken_rules_are_found(module: str, line: str, reason: str) -> None:
    found = faults(module, f'"""A module."""\n{line}\n')
    assert len(found) == 1
    assert reason in found[0]


def test_no_modules_import_each_other() -> None:
    trees = {module: ast.parse(source) for module, source in SOURCES.items() if module not in ENTRANCES}
    assert circles({module: {name for _, name in _imports(tree, module)} for module, tree in trees.items()}) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c", "os"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize("room", [room for room in FOLDERS if FOLDERS[room] and room in INSIDE])
def test_every_part_of_a_room_with_folders_has_a_row(room: str) -> None:
    parts = {_part(module) for module in SOURCES if _room(module) == room} - {""}
    listed = [part for row in INSIDE.get(room, ()) for part in row]
    assert sorted(listed) == sorted(parts)


@pytest.mark.parametrize("folder", sorted({path.parent for path in PACKAGE.rglob("*.py")}))
def test_folders_can_be_read_at_a_glance(folder: Path) -> None:
    num_modules = sum(path.suffix == ".py" for path in folder.iterdir())
    assert num_modules <= MAX_MODULES, f"{folder} has {num_modules} modules; which rooms are in it?"


def _wide_functions() -> dict[str, int]:
    """Return the functions with too many parameters, with their number; `self` and `cls` do not count."""
    found = {}
    for module, source in SOURCES.items():
        tree = ast.parse(source)
        methods = {
            item: f"{owner.name}." for owner in tree.body if isinstance(owner, ast.ClassDef) for item in owner.body
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                names = [item.arg for item in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                count = len(names) + (given.vararg is not None) + (given.kwarg is not None)
                count -= bool(names) and names[0] in ("self", "cls")
                if count > MAX_PARAMETERS:
                    found[f"{module}.{methods.get(node, '')}{node.name}"] = count
    return found


def test_functions_take_few_parameters_or_say_why() -> None:
    assert sorted(_wide_functions()) == sorted(WIDE)


def test_the_front_door_takes_at_most_ten() -> None:
    assert _wide_functions()["vpipe.runtime.pipeline.Pipeline.__init__"] <= 10


def test_one_module_asks_torch_for_its_rank() -> None:
    asking = [module for module, source in SOURCES.items() if re.search(r"dist\.get_(rank|world_size)\(", source)]
    assert asking == ["vpipe.runtime.comm.world"]


CHANGES = {"add", "append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}


def _changed_globals(source: str) -> Iterator[str]:
    """Yield the names of a module that a function of it assigns to, or changes in place."""
    tree = ast.parse(source)
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                yield from node.names
            changed: ast.AST | None = None
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                changed = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
                changed = node.func.value
            if isinstance(changed, ast.Name) and changed.id in names:
                yield changed.id


@pytest.mark.parametrize("module", SOURCES)
def test_no_module_changes_its_globals(module: str) -> None:
    assert list(_changed_globals(SOURCES[module])) == []


@pytest.mark.parametrize("body", ["global x\n    x = 1", "x['a'] = 1", "x.append(1)"])
def test_changed_globals_are_found(body: str) -> None:
    assert list(_changed_globals(f"x = []\n\ndef f():\n    {body}\n")) == ["x"]


def test_no_two_public_classes_share_a_name() -> None:
    homes: dict[str, list[str]] = {}
    for module, source in SOURCES.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("module", sorted(LAZY))
def test_no_lazy_import_is_listed_in_vain(module: str) -> None:
    assert list(_lazy_imports(ast.parse(SOURCES[module]), module))


def test_missing_docstring_is_found() -> None:
    assert faults("vpipe.errors", "x = 1\n") == ["vpipe.errors:1: no module docstring"]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (
            "vpipe.schedule.families.gpipe",
            "import heapq\nfrom vpipe.errors import ScheduleError\nfrom vpipe.schedule.action import Action",
        ),
        ("vpipe.config", "import pydantic\nfrom vpipe.errors import ConfigError"),
        ("vpipe.cli.train", "from vpipe.launch.local import launch\nprint('done')"),
    ],
)
def test_good_modules_pass(module: str, line: str) -> None:
    assert faults(module, f'"""A module."""\n{line}\n') == []
