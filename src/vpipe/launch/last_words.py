"""Time for last words: torchrun ends all ranks as soon as one has failed, often before they noticed it.

Under `vpipe train` the launcher says what each rank was doing. Under torchrun by hand every rank has to say it itself:
one that lost its peer learns why within moments, and one that will make the first one's mistake gets there too.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

__all__ = ["delay_sigterm"]


def delay_sigterm(seconds: float, speak: Callable[[], None]) -> None:
    """Go on for `seconds` after SIGTERM; if the process is still there then, call `speak` and end it with exit code 1.

    To be called in the main thread. Another thread watches the time, because the main thread may be inside a C++ wait,
    where Python handles no signals.
    """
    told, teller = socket.socketpair()
    teller.setblocking(False)
    signal.signal(
        signal.SIGTERM, lambda number, frame: None
    )  # without a handler nothing would be written to the socket
    # Detached: a socket that nobody refers to would be closed.
    signal.set_wakeup_fd(teller.detach(), warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGTERM not in told.recv(1):
            pass
        time.sleep(seconds)
        speak()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="last words").start()
