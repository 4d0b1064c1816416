import re

import pytest

from vpipe.errors import LaunchError
from vpipe.launch import run_directory as module
from vpipe.launch.run_directory import create_run_directory, point_latest_to


class StandingClock:
    @staticmethod
    def now():
        return module_datetime(2031, 5, 17, 9, 30, 1)


module_datetime = module.datetime


def test_the_name_is_the_time_and_latest_is_not_there_yet(tmp_path):
    path = create_run_directory(tmp_path / "logs")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d", path.name)
    assert path.is_dir()
    assert [each.name for each in (tmp_path / "logs").iterdir()] == [path.name]


def test_latest_leads_to_the_last_one_that_began(tmp_path):
    for _ in range(2):
        path = create_run_directory(tmp_path)
        point_latest_to(path)
        assert (tmp_path / "latest").resolve() == path
    create_run_directory(tmp_path)
    assert (tmp_path / "latest").resolve() == path


def test_an_existing_directory_is_never_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "datetime", StandingClock)
    names = [create_run_directory(tmp_path).name for _ in range(3)]
    assert names == ["2031-05-17T09-30-01", "2031-05-17T09-30-01-2", "2031-05-17T09-30-01-3"]


def test_a_file_called_latest_is_left_alone(tmp_path):
    (tmp_path / "latest").write_text("mine")
    point_latest_to(create_run_directory(tmp_path))
    assert (tmp_path / "latest").read_text() == "mine"


def test_a_relative_log_directory_gives_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert create_run_directory(module.Path("runs")).parent == tmp_path / "runs"


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(LaunchError, match=r"cannot create a run directory in log_directory '.*logs': Not a directory"):
        create_run_directory(tmp_path / "logs")
