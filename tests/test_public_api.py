"""The public names: sorted, there, documented, the same for type checkers, and free of torch as long as can be."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vpipe

SOURCE = ast.parse(Path(vpipe.__file__).read_text())

WITHOUT_TORCH = """
import sys
import vpipe
print(vpipe.__version__)
schedule = vpipe.build_schedule("1f1b", 4, 8)
vpipe.validate_schedule(schedule)
assert vpipe.simulate(schedule).makespan == 33, vpipe.Costs
vpipe.Action(0, vpipe.Kind.F, 0), vpipe.Placement(4), vpipe.Schedule, vpipe.WeightRule, vpipe.Simulation
vpipe.ConfigError, vpipe.VPipeError
assert "pydantic" not in sys.modules, "pydantic"
vpipe.load_config, vpipe.RunConfig
vpipe.find_plan, vpipe.Plan, vpipe.read_profile, vpipe.decide, vpipe.explain_lines, vpipe.simulate_run
assert "torch" not in sys.modules, "torch"
"""


def test_names_are_sorted_and_listed():
    assert vpipe.__all__ == sorted(vpipe.__all__)
    assert len(set(vpipe.__all__)) == len(vpipe.__all__)
    assert set(vpipe.__all__) <= set(dir(vpipe))


@pytest.mark.parametrize("name", [name for name in vpipe.__all__ if name != "__version__"])
def test_a_name_is_there_and_documented(name):
    value = getattr(vpipe, name)
    assert value.__name__ == name
    # An inherited or generated docstring is not one.
    documented = vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
    assert documented
    assert not documented.startswith(f"{name}(")


def test_type_checkers_see_the_same_names_from_the_same_modules():
    (block,) = (node for node in SOURCE.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == vpipe._HOME_OF
    assert {*seen, "__version__"} == set(vpipe.__all__)


def test_errors_are_all_public():
    from vpipe import errors

    assert set(errors.__all__) <= set(vpipe.__all__)


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'vpipe' has no attribute 'Pipelines'"):
        _ = vpipe.Pipelines


def test_schedules_and_configurations_work_without_torch():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{vpipe.__version__}\n"


def test_star_import_gives_the_names_and_no_more():
    names = {}
    exec("from vpipe import *", names)
    assert set(names) - {"__builtins__"} == set(vpipe.__all__)
