"""What all commands share: how mistakes end, whatever they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vpipe.cli import COMMANDS, main


def ended(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["vpipe", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    assert isinstance(raised.value.code, int)
    return raised.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("scheddule", "Error: No such command 'scheddule'. Did you mean 'schedule'?"),
        ("tarin", "Error: No such command 'tarin'. Did you mean 'train'?"),
        ("zzz", "Error: No such command 'zzz'."),
    ],
)
def test_a_mistyped_command(
    word: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = ended([word], monkeypatch, capsys)
    assert code == 1
    assert error.splitlines()[-1] == said


def test_every_command_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "vpipe", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name, sentence in COMMANDS.items():
        assert f"  {name} " in listed
        assert sentence in listed


def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        shown = subprocess.run(
            [sys.executable, "-m", "vpipe", "schedule", "1f1b"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert shown.returncode == 1
    assert shown.stderr.splitlines()[0] == "error: No space left on device"
    assert "Traceback" not in shown.stderr
