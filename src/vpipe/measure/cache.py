"""Profiles that were measured before, one file each, by fingerprint."""

from __future__ import annotations

import logging
import os
from datetime import datetime
from pathlib import Path

from vpipe.errors import PlanError
from vpipe.planner.profile.profile import Profile, read_profile, write_profile

__all__ = ["cache_path", "cache_words", "read_cached", "write_cached"]

_LOGGER = logging.getLogger(__name__)


def cache_path(fingerprint: str) -> Path:
    """Return where a profile is kept: ``$XDG_CACHE_HOME/vpipe/profiles``, by default in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return folder / "vpipe" / "profiles" / f"{fingerprint}.json"


def cache_words(fingerprint: str) -> str:
    """Say since when a profile is in the cache, and where, for people who wonder why nothing is measured."""
    path = cache_path(fingerprint)
    when = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
    return f"measured {when:%Y-%m-%d %H:%M}, from {path}; `vpipe profile --no-cache` measures again"


def read_cached(fingerprint: str) -> Profile | None:
    """Return the profile of this fingerprint; None where there is none that can be read."""
    path = cache_path(fingerprint)
    if not path.is_file():
        return None
    try:
        return read_profile(path)
    except PlanError as error:
        _LOGGER.warning("%s; measuring again", error)
        return None


def write_cached(profile: Profile) -> None:
    """Keep a profile for the next time; where that cannot be written, it is measured again then."""
    path = cache_path(profile.fingerprint)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_profile(profile, new)
        new.replace(path)
    except OSError as error:
        _LOGGER.warning("the profile cannot be kept in %s: %s", path.parent, error.strerror)
