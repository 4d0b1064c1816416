"""`vpipe simulate`: what it prints, and what it says where there is nothing to read."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from run_toys import write_run

from vpipe.cli.simulate import command
from vpipe.errors import ConfigError


@pytest.fixture
def run_directory(tmp_path):
    return write_run(tmp_path / "run")


def test_text_compares_predicted_and_measured(run_directory):
    result = CliRunner().invoke(command, ["--from-run", str(run_directory)])
    assert result.exit_code == 0
    step = next(line for line in result.output.splitlines() if line.startswith("step"))
    assert step.split()[-1] in ("+0.0%", "-0.0%")


def test_every_key_of_the_json_is_in_the_help(run_directory):
    result = CliRunner().invoke(command, ["--from-run", str(run_directory), "--format", "json"])
    text = CliRunner().invoke(command, ["--help"]).output
    data = json.loads(result.output)
    for key, value in data.items():
        assert key in text
        inner = value[0] if isinstance(value, list) else value if isinstance(value, dict) else {}
        for name in inner:
            assert name in text


def test_a_directory_without_a_run_is_an_error(tmp_path):
    result = CliRunner().invoke(command, ["--from-run", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
