"""What -o may write over: its own kind, and nothing else of the user's."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from vpipe.cli import main
from vpipe.cli.output import validate_output
from vpipe.errors import ConfigError

PLAN = json.dumps({"schedule": "1f1b", "partition": [2, 3]})
PROFILE = json.dumps({"format": 1, "sizes": []})
RUN = "train: {batch_size: 8}\n"


@pytest.mark.parametrize(("kind", "text"), [("plan", PLAN), ("profile", PROFILE), ("plan", ""), ("profile", "")])
def test_its_own_kind_and_nothing_may_be_written_over(tmp_path: Path, kind: str, text: str) -> None:
    validate_output(tmp_path / "new.json", kind)
    (tmp_path / "old.json").write_text(text)
    validate_output(tmp_path / "old.json", kind)


@pytest.mark.parametrize("kind", ["plan", "profile"])
@pytest.mark.parametrize("content", [RUN, PLAN, PROFILE, '{"partition": [2, 3]}', "[1]", "3", b"\xff\x00"])
def test_another_kind_is_refused(tmp_path: Path, kind: str, content: str | bytes) -> None:
    if content == {"plan": PLAN, "profile": PROFILE}[kind]:
        return
    path = tmp_path / "mine"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = f"-o {path} exists and is no {kind}, so it is not written over; give another name, or remove it first"
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate_output(path, kind)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"-o {tmp_path} is a folder; give the name of a file, e.g. -o .*/plan.json"):
        validate_output(tmp_path, "plan")


@pytest.mark.parametrize(
    "command",
    [("plan", "run.yml"), ("profile", "run.yml"), ("estimate", "--model", "gpt3-175b")],
    ids=lambda command: command[0],
)
def test_commands_refuse_before_they_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victim.yml").write_text(RUN)
    monkeypatch.setattr(sys, "argv", ["vpipe", *command, "-o", "victim.yml"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: -o victim.yml exists and is no p")
    assert (tmp_path / "victim.yml").read_text() == RUN
