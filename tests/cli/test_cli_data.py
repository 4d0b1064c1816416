from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vpipe.cli import main
from vpipe.cli.data import command
from vpipe.cli.progress import show_progress
from vpipe.config import build_config
from vpipe.config.text import parse_yaml
from vpipe.data.bert.dataset import open_bert


def _run(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.txt"
    path.write_text("\n".join(f"The {n}th line is here. It has two sentences." for n in range(40)), encoding="utf-8")
    return path


def test_help_is_complete_and_needs_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from vpipe.cli.data import command\n"
        "print(CliRunner().invoke(command, ['prepare', 'bert', '--help']).output)\n"
        "assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for flag in (
        "--input FILE",
        "--out DIR",
        "--vocab-size",
        "--sequence-length",
        "--masking [static|dynamic]",
        "--seed",
    ):
        assert flag in shown


@pytest.mark.parametrize(("words", "shown"), [(["--help"], "prepare"), (["prepare", "--help"], "bert")])
def test_groups_list_what_is_in_them(words: list[str], shown: str) -> None:
    assert shown in _run(*words).output


def test_a_set_is_made_and_its_use_shown(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    options = [
        "--vocab-size",
        120,
        "--sequence-length",
        24,
        "--masking",
        "dynamic",
        "--eval-fraction",
        0.25,
        "--seed",
        4,
    ]
    result = _run("prepare", "bert", "--input", text, "--out", out, *options)
    assert result.exit_code == 0, result.output
    data = open_bert(out)
    assert (data.masking, data.meta.options.seed, data.meta.options.sequence_length) == ("dynamic", 4, 24)
    assert "tiny.txt: 0.0 MB, 40 documents (line)" in result.stdout
    assert "documents   30 train, 10 eval" in result.stdout
    assert f"samples     {data.num_samples} train, " in result.stdout
    assert result.stdout.endswith(f"    data_dir: {out}\n    sequence_length: 24\n    masking: dynamic\n")
    assert result.stderr.splitlines()[:3] == ["read", "find sentences", "train the tokenizer"]


def test_what_is_shown_is_yaml_that_works_in_any_folder(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shown = _run("prepare", "bert", "--input", text, "--out", "it's: a #set").stdout
    yaml = parse_yaml(shown.partition("use it in a run's YAML:\n")[2], "shown")
    run = build_config({**yaml, "train": {"iterations": 1}}, folder=tmp_path / "elsewhere")
    assert run.data.data_dir == tmp_path / "work" / "it's: a #set"


def test_every_option_arrives(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    options = ["--passes", 3, "--limit-samples", 9, "--limit-alphabet", 30, "--cased", "--documents", "line"]
    assert _run("prepare", "bert", "--input", text, "--out", out, *options).exit_code == 0
    chosen = open_bert(out).meta.options
    assert (chosen.num_passes, chosen.limit_samples, chosen.limit_alphabet) == (3, 9, 30)
    assert (chosen.lowercase, chosen.documents) == (False, "line")
    assert open_bert(out).num_samples == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "{tmp}/no.txt", "--out", "{tmp}/o"], r"no.txt cannot be read (No such file or directory)"),
        (
            ["--input", "{tmp}/tiny.txt", "--out", "{tmp}"],
            "is not empty and holds no prepared set, so it is left alone",
        ),
        (["--out", "{tmp}/o", "--vocab-size", "3"], "--vocab-size must be at least 64, got 3"),
        (["--out", "{tmp}/o", "--masking", "often"], "'often' is not one of 'static', 'dynamic'"),
        (["--input", "{tmp}/tiny.txt"], "Missing option '--out'"),
    ],
)
def test_mistakes_end_with_one_message_and_code_1(
    text: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [word.format(tmp=tmp_path) for word in words]
    monkeypatch.setattr(sys, "argv", ["vpipe", "data", "prepare", "bert", *filled])
    with pytest.raises(SystemExit) as raised:
        main()
    shown = capsys.readouterr()
    assert raised.value.code == 1
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "o").exists()


def test_force_replaces_a_set(text: Path, tmp_path: Path) -> None:
    words = ["prepare", "bert", "--input", text, "--out", tmp_path / "set", "--limit-samples"]
    assert _run(*words, 5).exit_code == 0
    assert "already holds a set prepared with other options" in str(_run(*words, 6).exception)
    assert open_bert(tmp_path / "set").num_samples == 5
    assert _run(*words, 6, "--force").exit_code == 0
    assert open_bert(tmp_path / "set").num_samples == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    text, sets = tmp_path / "text", tmp_path / "sets"
    os.mkfifo(text)  # nobody writes, so there is no end
    sets.mkdir()
    command = [sys.executable, "-m", "vpipe", "data", "prepare", "bert", "--input", str(text), "--out", sets / "set"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "read\n"
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert error.splitlines()[-1] in ("interrupted", f"ended by signal {number} ({number.name})")
    assert list(sets.iterdir()) == []


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 0.0, 1.0, 11.0, 12.0, 13.0, 24.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with show_progress() as progress:
        for step, done in (("read", 0), ("read", 1), ("read", 500), ("read", 600), ("write", 0), ("write", 1000)):
            progress(step, done, 1000)
    assert capsys.readouterr().err.splitlines() == ["read", "read: 500 of 1,000", "write"]


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with show_progress() as progress:
        progress("read", 1, 3)
        progress("read", 3, 3)
        progress("train", 0, 0)
        progress("write", 5, 5)
    shown = terminal.getvalue()
    assert "read" in shown
    assert "3/3" in shown
    assert "train" in shown
    assert "5/5" in shown
