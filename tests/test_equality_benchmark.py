"""A slice of benchmarks/equality: its plain loop shares no code with the project, and a few rows run."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOP = ROOT / "benchmarks/equality/loop.py"


def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.equality.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_loop_knows_nothing_of_the_project() -> None:
    imported = set()
    for node in ast.walk(ast.parse(LOOP.read_text())):
        if isinstance(node, ast.Import):
            imported |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    roots = {name.split(".")[0] for name in imported}
    assert roots - set(sys.stdlib_module_names) == {"numpy", "torch"}


@pytest.mark.parametrize("pattern", ["skips | *recompute some*", "codebook | pipedream*"])
def test_rows_of_one_rank_are_equal(pattern: str, tmp_path: Path) -> None:
    done = sweep("--ranks", "1", "--only", pattern, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "ranks_1.json").read_text())
    assert found["num_rows"] > 0
    assert found["not_equal"] == []


def test_rows_of_two_ranks_are_equal_and_move_bytes(tmp_path: Path) -> None:
    done = sweep("--ranks", "2", "--only", "*gpipe*| swap |*", "--part", "1/4", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "ranks_2.json").read_text())
    assert found["not_equal"] == []
    assert found["bytes_moved"] > 4096


def test_a_pattern_without_rows_says_so() -> None:
    done = sweep("--only", "no such row")
    assert done.returncode == 1
    assert done.stdout == "no row has 'no such row' in its name\n"
