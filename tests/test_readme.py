"""README says nothing that is not so: its links, its table, its commands and its program."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from vpipe.cli import _cli
from vpipe.config import load_config
from vpipe.draw.overview import overview

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    *(line.split(" #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()),
    *re.findall(r"`((?:vpipe|torchrun) [^`]*)`", TEXT),
]
PLACEHOLDERS = {"FILE": "configs/quickstart.yml", "NAME": "1f1b", "my_run.yml": "configs/quickstart.yml"}


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_of_schedules_is_computed() -> None:
    shown = re.findall(r"^\| `([\w.-]+)`[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|$", TEXT, re.MULTILINE)
    rows = {row.schedule: row for row in overview(4, 8)}
    assert {line[0] for line in shown} == set(rows) - {"searched"}
    for name, updates, bubble, peak, versions, staleness in shown:
        row = rows[name]
        assert updates.strip() == ("synchronous" if row.synchronous else "asynchronous")
        assert row.bubble_fraction is not None
        assert bubble.strip() == (f"{row.bubble_fraction:.1%}".replace("%", " %") if row.synchronous else STEADY)
        numbers = [float(cell) for cell in (peak, versions, staleness)]
        assert numbers == [row.peak_activations, row.weight_versions, row.staleness]


STEADY = "none in the steady state"


@pytest.mark.parametrize(
    "command", [line for line in dict.fromkeys(COMMANDS) if line and not line.startswith("source")]
)
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse each command as the command line would, without running it; its configuration has to be in order."""
    monkeypatch.chdir(ROOT)
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command.replace("json|csv|svg|trace", "json"))]
    if words[0].startswith("scripts/"):
        assert (ROOT / words[0]).exists()
        words = ["vpipe", "train", "configs/quickstart.yml", *words[1:]]
    if words[0] == "torchrun":
        if "-m" not in words:
            return
        words = words[words.index("-m") + 1 :]
    assert words.pop(0) == "vpipe"
    node: click.Command = _cli
    context = click.Context(node, info_name="vpipe")
    while isinstance(node, click.Group):
        found = node.get_command(context, words.pop(0))
        assert found is not None
        node, context = found, click.Context(found, parent=context)
    if not words:
        return  # only the command's name
    node.parse_args(context, words)
    config = context.params.get("config") or context.params.get("file")
    if config is not None:
        load_config(config, context.params.get("overrides", ()))


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_the_program_has_ten_lines_and_runs(tmp_path: Path, schedule: str) -> None:
    (program,) = [block for kind, block in BLOCKS if kind == "python"]
    assert len([line for line in program.splitlines() if line.strip()]) <= 10
    assert 'plan="1f1b"' in program
    (tmp_path / "my_script.py").write_text(program.replace("1f1b", schedule))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "my_script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [int(line[0]) for line in lines] == list(range(20))
    assert float(lines[-1][1]) < float(lines[0][1])
