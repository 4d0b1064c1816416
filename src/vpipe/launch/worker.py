"""The process of one rank: runs its function and makes every way to fail short, clear and quick.

``python -m vpipe.launch.worker package.module:function ARGUMENT...`` calls ``function([ARGUMENT, ...])``. Nothing heavy
is imported before the rank can be interrupted and its errors are recorded.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import importlib
import json
import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from vpipe.errors import ExecutionError, LaunchError, VPipeError
from vpipe.launch.environment import LAST_WORDS_SECONDS, LAUNCHER_PID, RUN_DIRECTORY
from vpipe.launch.last_words import delay_sigterm
from vpipe.launch.logs import configure_logging
from vpipe.runtime.status import StatusFile, status_path

__all__ = ["load_function", "run_worker"]

_PR_SET_PDEATHSIG = 1
_SAME_MISTAKE_SECONDS = 1
"""How long a rank that torchrun started waits for the others to find what it refuses, before its end ends them all."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_LAST_WORDS_SECONDS = 5.0

logger = logging.getLogger("vpipe.launch.worker")  # the module's own name is __main__ when it is run


def run_worker(main: Callable[[], None]) -> None:
    """Run `main` as one rank; return when it ends well, else end the process with a recorded message.

    A VPipeError is logged as its text alone, any other exception with its traceback; both are left for the launcher
    in torchrun's error file. The process ends at once with exit code 1: no thread or destructor that waits for a lost
    peer can keep it.
    """
    _prepare_process()
    configure_logging()
    status = None
    try:
        status = _open_status()
        main()
    except VPipeError as error:
        logger.error("%s", error)
        if _is_under_torchrun() and not isinstance(error, ExecutionError):
            time.sleep(_SAME_MISTAKE_SECONDS)
        _end(error, str(error))
    except SystemExit as error:
        if error.code not in (None, 0):
            logger.exception("exit with %s", error.code)
            _end(error, f"exit with {error.code}", exit_code=error.code if isinstance(error.code, int) else 1)
    except Exception as error:
        full = _full_disk(error)
        logger.exception("%s", full or f"unexpected {type(error).__name__}")
        _end(full or error, str(full or f"{type(error).__name__}: {error}"))
    if status is not None:
        status.remove()


def load_function(target: str) -> Callable[[Sequence[str]], None]:
    """Import ``package.module:function``.

    Raises:
        LaunchError: `target` has another form, or there is no such function.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise LaunchError(f"worker function '{target}' is not of the form package.module:function")
    function = getattr(importlib.import_module(module_name), name, None)
    if not callable(function):
        raise LaunchError(f"module '{module_name}' has no function '{name}'")
    return function  # type: ignore[no-any-return]


def _prepare_process() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which measures memory, tells of every start
    faulthandler.enable()  # a crash in native code leaves the Python stack in the log
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # The launcher shows what Ctrl-C means; the rank may be inside a C++ wait that Python cannot interrupt.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(launcher):  # it died before the line above
            os._exit(1)
    elif _is_under_torchrun():
        delay_sigterm(_last_words_seconds(), _say_told_to_end)


def _is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and LAUNCHER_PID not in os.environ


def _last_words_seconds() -> float:
    given = os.environ.get(LAST_WORDS_SECONDS)
    if given is None:
        return _LAST_WORDS_SECONDS
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(given)) < math.inf:
            return seconds
    logger.warning(
        "%s is '%s', which is no number of seconds; taking %g", LAST_WORDS_SECONDS, given, _LAST_WORDS_SECONDS
    )
    return _LAST_WORDS_SECONDS


def _say_told_to_end() -> None:
    logger.error("told to end (SIGTERM), as torchrun does when another rank has failed; its message says why")
    logging.shutdown()


def _open_status() -> StatusFile | None:
    directory, rank = os.environ.get(RUN_DIRECTORY), os.environ.get("RANK")
    if not directory or rank is None:
        return None
    return StatusFile(status_path(Path(directory), int(rank)))


def _full_disk(error: Exception) -> LaunchError | None:
    """Say in our words what a full disk means; None where `error` is something else."""
    if not isinstance(error, OSError) or error.errno not in _NO_SPACE:
        return None
    place = f" {error.filename}" if error.filename else ""
    return LaunchError(f"cannot write{place}: {error.strerror}; free some space, or choose another log_directory")


def _end(error: BaseException, message: str, *, exit_code: int = 1) -> NoReturn:
    _record(error, message)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _record(error: BaseException, message: str) -> None:
    """Write torchrun's error file, whole or not at all: the launcher may end this process at any moment."""
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not name:
        return
    now = time.time()
    expected = isinstance(error, VPipeError)
    stack = message if expected else "".join(traceback.format_exception(error))
    content = {
        "message": {"message": message, "extraInfo": {"py_callstack": stack, "timestamp": str(int(now))}},
        "vpipe": {"kind": type(error).__name__, "expected": expected, "time": now},
    }
    new = Path(f"{name}.new")
    with contextlib.suppress(OSError):  # the log has it too
        new.write_text(json.dumps(content))
        new.replace(name)


def _main() -> None:
    target, *arguments = sys.argv[1:]
    run_worker(lambda: load_function(target)(arguments))


if __name__ == "__main__":
    _main()
