"""What a check finds while it runs, kept in a file at every step: a crash or a time limit loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["CheckFailed", "Notes"]


class CheckFailed(Exception):
    """What was checked is wrong; the text says how, in one line."""


class Notes:
    """The notes of one check, and where it works."""

    def __init__(self, folder: Path, device: str, num_devices: int) -> None:
        self.folder = folder
        """Its own, empty at the start."""
        self.device = device
        """`cuda` or `cpu`."""
        self.num_devices = num_devices
        """CUDA devices that there are."""
        self.content: dict[str, Any] = {
            "finished": False, "found": "", "numbers": {}, "problems": [], "commands": [], "traceback": "",
        }  # fmt: skip
        self._save()

    @classmethod
    def path(cls, folder: Path) -> Path:
        """Return the file of the check that works in `folder`."""
        return folder / "notes.json"

    @property
    def on_gpu(self) -> bool:
        """Tell whether this is about a CUDA device."""
        return self.device == "cuda"

    def number(self, **values: Any) -> None:
        """Keep what was measured, by name."""
        self.content["numbers"].update(values)
        self._save()

    def say(self, text: str) -> None:
        """Keep what the table says of a check that passes; several texts are joined."""
        self.content["found"] = "; ".join(filter(None, (self.content["found"], text)))
        self._save()

    def problem(self, text: str) -> None:
        """Keep that something is wrong, and go on."""
        self.content["problems"].append(text)
        self._save()

    def command(self, text: str) -> None:
        """Keep a command that is run."""
        self.content["commands"].append(text)
        self._save()

    def trace(self, text: str) -> None:
        """Keep a traceback, after those that are there."""
        self.content["traceback"] += text
        self._save()

    def finish(self) -> None:
        """Say that the check came to its end."""
        self.content["finished"] = True
        self._save()

    def _save(self) -> None:
        path = self.path(self.folder)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.content))
        new.replace(path)
