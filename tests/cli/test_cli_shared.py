"""What several commands share: the option --set, and the file that ranks read."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from vpipe.cli.shared import write_config
from vpipe.config import load_config


@pytest.mark.parametrize("name", ["config", "plan", "profile", "sweep", "train", "verify"])
def test_every_command_says_where_relative_paths_start(name: str) -> None:
    command = importlib.import_module(f"vpipe.cli.{name}").command
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    assert f"relative paths start from {'FILE' if name == 'config' else 'CONFIG'}'s folder" in text
    assert "--set KEY=VALUE" in text


def test_ranks_read_the_run_as_it_was_although_its_files_change(tmp_path: Path) -> None:
    run = tmp_path / "run.yml"
    (tmp_path / "old").mkdir()
    (tmp_path / "latest").symlink_to("old")
    run.write_text("model: {type: custom, entry: 'm.py:f'}\ndata: {type: custom, entry: 'latest/d.py:f'}\n")
    config = load_config(run, ["train.iterations=3"])
    (tmp_path / "new").mkdir()
    path = write_config(config, tmp_path / "new")
    run.unlink()
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("new")
    assert load_config(path) == config
    assert config.data.entry == f"{tmp_path}/old/d.py:f"
