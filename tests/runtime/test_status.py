import signal
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from vpipe.runtime.status import STATUS_BYTES, StatusFile, read_status, status_path


def test_the_last_line_survives_sigkill(tmp_path):
    path = status_path(tmp_path, 2)
    program = (
        "import os, signal, sys, pathlib; from vpipe.runtime.status import StatusFile\n"
        "status = StatusFile(pathlib.Path(sys.argv[1])); status.write('running')\n"
        "status.write('waiting for 1F3 from rank 0')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    start = time.time()
    process = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert process.returncode == -signal.SIGKILL
    status = read_status(tmp_path, 2)
    assert status is not None
    assert status.text == "waiting for 1F3 from rank 0"
    assert start <= status.written_at <= time.time()
    assert status.pid > 0
    assert path.stat().st_size == STATUS_BYTES


def test_a_new_file_says_starting_and_a_clean_end_removes_it(tmp_path):
    path = status_path(tmp_path, 0)
    with StatusFile(path) as status:
        assert read_status(tmp_path, 0).text == "starting"
        status.write("long " * 10)
        status.write("short")
        assert read_status(tmp_path, 0).text == "short"
    assert not path.exists()
    assert read_status(tmp_path, 0) is None


def test_a_failure_keeps_the_file(tmp_path):
    with pytest.raises(ValueError, match="stop"), StatusFile(status_path(tmp_path, 0)):
        raise ValueError("stop")
    assert read_status(tmp_path, 0).text == "starting"


def test_long_and_non_ascii_text_is_cut_not_refused(tmp_path):
    StatusFile(status_path(tmp_path, 0)).write("é" * 500)
    text = read_status(tmp_path, 0).text
    assert set(text) == {"é"}
    assert len(text.encode()) <= STATUS_BYTES


def test_a_file_that_is_no_status_reads_as_none(tmp_path):
    for content in (b"something else", bytes(STATUS_BYTES)):  # the latter has just been made
        status_path(tmp_path, 0).write_bytes(content)
        assert read_status(tmp_path, 0) is None


def test_the_last_line_is_there_until_the_next_one_is(tmp_path, monkeypatch):
    # Another process may read at any moment, and ends all ranks if one seems to be gone.
    with StatusFile(status_path(tmp_path, 0)) as status:
        status.write("running")
        monkeypatch.setattr("vpipe.runtime.status.time", SimpleNamespace(time=lambda: "no number"))
        with pytest.raises(struct.error):
            status.write("waiting")
        assert read_status(tmp_path, 0).text == "running"


def test_a_full_disk_is_an_error_and_no_crash_later_on(tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        StatusFile(status_path(tmp_path, 0))
