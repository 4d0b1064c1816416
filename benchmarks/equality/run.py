"""The sweep: every model in every schedule, on one to four ranks, against a plain loop in one process, bit for bit.

    python -m benchmarks.equality.run [--only PATTERN] [--ranks 1 2] [--part 1/3] [--list] [--out FOLDER]

Ranks are started once for each number of them, and again after a row that some of them alone refuse. PATTERN is a part
of a row's name, or a pattern with `*`. The exit code is 1 if a row differs or fails; refusals are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from zlib import crc32

from benchmarks.common import ROOT, environment, format_table, write_results
from benchmarks.equality.ranks import message_path
from benchmarks.equality.rows import RANKS, Row, all_rows

OUT = Path(__file__).parent / "results"
SILENCE_SECONDS = 180.0
"""How long a row may take before the ranks are ended."""
OUTCOMES = ("equal", "different", "failed", "refused")


class Ranks:
    """The processes that run some rows."""

    def __init__(self, folder: Path, num_ranks: int, first: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.equality.ranks", str(folder), str(num_ranks), str(first)]
        self._started = []
        for rank in range(num_ranks):
            variables = {**os.environ, "OMP_NUM_THREADS": "1"}
            if num_ranks > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
                variables |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            log = (folder / f"log.{rank}").open("a")
            self._started.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log))

    @property
    def have_ended(self) -> bool:
        """Tell whether all ended well."""
        return all(item.poll() == 0 for item in self._started)

    @property
    def have_failed(self) -> bool:
        """Tell whether one ended with an error."""
        return any(item.poll() not in (None, 0) for item in self._started)

    def end(self) -> None:
        """End those that run."""
        for item in self._started:
            if item.poll() is None:
                item.kill()
            item.wait()


class Table:
    """What rows of one number of ranks gave, as it comes in."""

    def __init__(self, rows: Sequence[Row], folder: Path) -> None:
        self.rows, self.folder = rows, folder
        self.outcomes: list[dict[str, Any]] = []
        (folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
        self._path = folder / "found.jsonl"
        self._path.touch()
        self._num_read = 0
        self._start = time.perf_counter()

    def read(self) -> int:
        """Take what ranks have found since; return how much that is."""
        lines = self._path.read_text().splitlines(keepends=True)
        fresh = [line for line in lines[self._num_read :] if line.endswith("\n")]
        self._num_read += len(fresh)
        for line in fresh:
            self.add(json.loads(line))
        return len(fresh)

    def add(self, outcome: dict[str, Any]) -> None:
        """Add what the next row gave."""
        row = self.rows[len(self.outcomes)]
        self.outcomes.append({"row": row.name, **{key: item for key, item in outcome.items() if key != "index"}})
        done, seconds = len(self.outcomes), time.perf_counter() - self._start
        if outcome["outcome"] != "equal":
            print(f"  {outcome['outcome']}: {row.name}: {outcome['reason'][:300]}", flush=True)
        if done % 25 == 0 or done == len(self.rows):
            print(f"ranks {row.num_ranks}: {done}/{len(self.rows)} rows in {seconds:.0f} s", flush=True)

    def add_failed(self, num_ranks: int) -> None:
        """Add the row at which ranks ended, with the message of the one that knows why."""
        index = len(self.outcomes)
        paths = [message_path(self.folder, index, rank) for rank in range(num_ranks)]
        told = [json.loads(path.read_text()) for path in paths if path.exists()]
        told.sort(key=lambda item: bool(item["is_lost_peer"]))
        silent = {"outcome": "failed", "reason": "the ranks were silent, or ended without a word"}
        self.add(told[0] if told else silent)


def run_rows(rows: Sequence[Row], folder: Path) -> list[dict[str, Any]]:
    """Run rows of one number of ranks."""
    table, num_ranks = Table(rows, folder), rows[0].num_ranks
    while len(table.outcomes) < len(rows):
        ranks = Ranks(folder, num_ranks, len(table.outcomes))
        last = time.monotonic()
        while not ranks.have_ended and not ranks.have_failed and time.monotonic() - last < SILENCE_SECONDS:
            time.sleep(0.1)
            if table.read():
                last = time.monotonic()
        ranks.end()
        table.read()
        if len(table.outcomes) < len(rows):
            table.add_failed(num_ranks)
    return table.outcomes


def run_ranks(rows: Sequence[Row], out: Path | None, chosen: str) -> list[dict[str, Any]]:
    """Run rows of one number of ranks, tell what they gave, and write it into the folder `out`."""
    machine, start = environment(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_rows(rows, Path(folder))
    seconds = round(time.perf_counter() - start)
    counts = {
        key: count_by(outcomes, rows, key) for key in ("num_ranks", "model", "family", "memory", "update", "optimizer")
    }
    for key, table in counts.items():
        print(f"\n{format_table([key, *OUTCOMES], table)}")
    print(f"\n{len(rows)} rows in {seconds} s")
    if out is not None:
        results = {
            "environment": machine,
            "seconds": seconds,
            "chosen": chosen.strip(),
            "num_rows": len(rows),
            "bytes_moved": sum(outcome.get("bytes_moved", 0) for outcome in outcomes),
            "counts": {
                key: [dict(zip((key, *OUTCOMES), line, strict=True)) for line in table] for key, table in counts.items()
            },
            "refusals": reasons(outcomes),
            "not_equal": [outcome for outcome in outcomes if outcome["outcome"] != "equal"],
        }
        write_results(out / f"ranks_{rows[0].num_ranks}.json", results)
    return outcomes


def count_by(outcomes: Sequence[dict[str, Any]], rows: Sequence[Row], key: str) -> list[list[object]]:
    """Count the outcomes by what rows have as `key`."""
    counts: dict[str, Counter[str]] = {}
    for row, outcome in zip(rows, outcomes, strict=True):
        counts.setdefault(str(getattr(row, key)), Counter())[outcome["outcome"]] += 1
    return [[name, *(count[kind] for kind in OUTCOMES)] for name, count in counts.items()]


def reasons(outcomes: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Count the refusals by what they say, without the names and numbers in it."""
    texts = [outcome["reason"] for outcome in outcomes if outcome["outcome"] == "refused"]
    return dict(Counter(_without_names(text) for text in texts).most_common())


def _without_names(text: str) -> str:
    quoted = text.split("'")
    quoted[1::2] = ["..."] * len(quoted[1::2])
    return "".join("N" if letter.isdigit() else letter for letter in "'".join(quoted)).replace("NN", "N")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of a row's name, or a pattern with *")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, choices=RANKS)
    parser.add_argument("--part", default="1/1", metavar="I/N", help="one of N parts, of rows of all kinds")
    parser.add_argument("--list", action="store_true", help="print the rows' names and run nothing")
    parser.add_argument(
        "--out", type=Path, help="folder for ranks_N.json; default: results, where all rows of so many ranks are run"
    )
    arguments = parser.parse_args()
    pattern = arguments.only if "*" in arguments.only else f"*{arguments.only}*"
    every = all_rows(sorted(set(arguments.ranks)))
    rows = [row for row in every if fnmatchcase(row.name, pattern)]
    first, step = map(int, arguments.part.split("/"))
    rows = [row for row in rows if crc32(row.name.encode()) % step == first - 1]
    if arguments.list or not rows:
        print("\n".join(row.name for row in rows) or f"no row has '{arguments.only}' in its name")
        sys.exit(not rows)
    outcomes: list[dict[str, Any]] = []
    for num_ranks in sorted(set(arguments.ranks)):
        if own := [row for row in rows if row.num_ranks == num_ranks]:
            is_whole = len(own) == sum(row.num_ranks == num_ranks for row in every)
            outcomes += run_ranks(
                own, arguments.out or (OUT if is_whole else None), f"{arguments.only} {arguments.part}"
            )
    rows.sort(key=lambda row: row.num_ranks)
    print(f"\n{format_table(['ranks', *OUTCOMES], count_by(outcomes, rows, 'num_ranks'))}")
    for reason, number in reasons(outcomes).items():
        print(f"\nrefused {number} times: {reason}")
    sys.exit(any(outcome["outcome"] in ("different", "failed") for outcome in outcomes))


if __name__ == "__main__":
    main()
