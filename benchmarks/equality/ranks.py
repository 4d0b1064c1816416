"""One process of the sweep: runs rows one after another as one rank, and on rank 0 in the plain loop, too.

python -m benchmarks.equality.ranks FOLDER NUM_RANKS FIRST    # with torchrun's variables, where there are several ranks

`FOLDER/rows.json` has the rows. Rank 0 adds what it finds to `FOLDER/found.jsonl`. A row that fails on all
ranks alike is told there, and the next one is run; else a rank that failed leaves its message and ends, and whoever
started it starts all of them again.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.equality.options import UPDATES
from benchmarks.equality.rows import MOVING, Row
from benchmarks.equality.training import differences, train_loop, train_pipeline

from vpipe.errors import ConfigError, DataError, ModelError, PeerLostError, PlanError, ScheduleError

__all__ = ["message_path", "outcome_of_error"]

REFUSALS = (ConfigError, DataError, ModelError, PlanError, ScheduleError)
PATIENCE_SECONDS = 5.0
"""How long a rank that failed waits for the others to fail, too."""


def message_path(folder: Path, index: int, rank: int) -> Path:
    """Return where `rank` leaves why row `index` failed."""
    return folder / f"failed.{index}.{rank}.json"


def outcome_of_error(error: Exception) -> dict[str, Any]:
    """Describe a row that ended in an error: a refusal says what the user can do, and anything else is a failure."""
    refused = isinstance(error, REFUSALS)
    where = [] if refused else traceback.format_exception(error)[-12:]
    return {
        "outcome": "refused" if refused else "failed",
        "reason": f"{type(error).__name__}: {error}",
        "is_lost_peer": isinstance(error, PeerLostError),
        "where": where,
    }


def run_row(row: Row, rank: int) -> dict[str, Any]:
    """Run a row; on other ranks than the first nothing is compared."""
    found, moved = train_pipeline(row)
    if rank:
        return {}
    expected = train_loop(row)
    if not UPDATES[row.update].has_nan and [] in expected.losses:
        return {"outcome": "failed", "reason": "what the plain loop computes is not finite, so the row tests little"}
    if unequal := differences(found, expected):
        return {
            "outcome": "different",
            "reason": f"{len(unequal)} differ, first {unequal[0]}",
            "differing": unequal[:40],
        }
    if row.memory in MOVING and not moved:
        return {"outcome": "failed", "reason": "nothing was moved to host memory, so the row tests nothing"}
    return {"outcome": "equal", "bytes_moved": moved}


def _fails_everywhere(folder: Path, index: int, num_ranks: int) -> bool:
    """Wait for the other ranks to fail, too."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if all(message_path(folder, index, rank).exists() for rank in range(num_ranks)):
            return True
        time.sleep(0.02)
    return False


def main() -> None:
    folder, num_ranks, first = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rank = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    rows = [Row.read(item) for item in json.loads((folder / "rows.json").read_text())]
    with (folder / "found.jsonl").open("a") as found:
        for index in range(first, len(rows)):
            start = time.perf_counter()
            try:
                # Torch rewrites a script after its first runs, and even a plain loop has other bits then.
                with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                    outcome = run_row(rows[index], rank)
            except Exception as error:
                outcome = outcome_of_error(error)
                draft = folder / f"draft.{rank}"
                draft.write_text(json.dumps(outcome))
                draft.rename(message_path(folder, index, rank))
                if outcome["is_lost_peer"] or not _fails_everywhere(folder, index, num_ranks):
                    os._exit(3)  # the others wait for this one, and would for long
                if dist.is_initialized():
                    dist.destroy_process_group()
            if rank == 0:
                outcome["seconds"] = round(time.perf_counter() - start, 2)
                found.write(json.dumps({"index": index, **outcome}) + "\n")
                found.flush()


if __name__ == "__main__":
    main()
