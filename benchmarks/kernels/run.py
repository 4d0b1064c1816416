"""The equality suites under every choice of kernels that this processor has.

    python -m benchmarks.kernels.run

Takes some minutes for each choice. A choice is made by variables that libraries read when they start; one that asks for
instructions which the processor lacks ends with SIGILL, so what /proc/cpuinfo does not name is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.common import ROOT, environment, format_table, write_results

OUT = Path(__file__).parent / "results" / "kernels.json"
SUITES = (
    *(f"tests/runtime/test_{name}equality.py" for name in ("", "family_", "policy_", "searched_", "version_move_")),
    *(f"tests/runtime/test_{name}.py" for name in ("evaluation", "pipeline", "recompute", "split", "stage", "swap")),
    "tests/train/test_trainer_runs.py",
    *(f"tests/verify/test_{name}.py" for name in ("reference", "verify")),
    *(f"tests/model/test_{name}.py" for name in ("bert", "decoders", "export")),
)
OLDEST = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
NEEDED_FLAGS = {
    ("ATEN_CPU_CAPABILITY", "default"): (),
    ("ATEN_CPU_CAPABILITY", "avx2"): ("avx2", "fma"),
    ("ATEN_CPU_CAPABILITY", "avx512"): ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    ("MKL_CBWR", "COMPATIBLE"): (),
    ("MKL_CBWR", "AVX2"): ("avx2", "fma"),
    ("MKL_CBWR", "AVX512"): ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    ("ONEDNN_MAX_CPU_ISA", "SSE41"): ("sse4_1",),
    ("ONEDNN_MAX_CPU_ISA", "AVX"): ("avx",),
    ("ONEDNN_MAX_CPU_ISA", "AVX2"): ("avx2", "fma"),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"): ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
}


def choices() -> list[dict[str, str]]:
    """Return the variables of each choice: none, each alone, and the oldest kernels of all three libraries."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
    alone = [{name: value} for (name, value), needed in NEEDED_FLAGS.items() if flags.issuperset(needed)]
    return [{}, *alone, OLDEST]


def probe(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return what the kernels of a choice make of a few operations."""
    command = [sys.executable, "-m", "benchmarks.kernels.probe"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def run_suites(variables: Mapping[str, str]) -> dict[str, Any]:
    """Run the equality suites under a choice; return how many passed, what failed, and the seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", f"--junitxml={report}"]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        subprocess.run([*command, *SUITES], cwd=ROOT, env=settings, stdout=subprocess.DEVNULL, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    return {"passed": passed, "skipped": skipped, "failed": failed, "seconds": round(time.perf_counter() - start)}


def name_of(variables: Mapping[str, str]) -> str:
    """Write a choice as a shell would."""
    return " ".join(f"{name}={value}" for name, value in variables.items()) or "the machine's own"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--probe-only", action="store_true", help="print what differs and run no tests")
    arguments = parser.parse_args()
    machine = environment() | {"machine": platform.machine()}  # before the tests are a load of their own
    found: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for variables in choices():
        report = probe(variables)
        key = json.dumps(report)
        same = seen.setdefault(key, name_of(variables))
        row = {"kernels": name_of(variables), **report}
        if same != name_of(variables):
            row["same_as"] = same  # the same bits in all operations: nothing new to test
        elif not arguments.probe_only:
            row |= run_suites(variables)
        found.append(row)
        print(_line(row), flush=True)
    own = found[0]["digests"]
    table = format_table(
        ("kernels", "other bits than the machine's own", "rows alike", "passed", "failed"),
        [
            (
                row["kernels"],
                ", ".join(name for name, value in row["digests"].items() if value != own[name]) or "none",
                " ".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in row["rows"]),
                row.get("passed", "-"),
                len(row["failed"]) if "failed" in row else "-",
            )
            for row in found
        ],
    )
    print(table)
    if not arguments.probe_only:
        write_results(arguments.out, {"environment": machine, "runs": found})
    if any(row.get("failed") for row in found):
        sys.exit(1)


def _line(row: Mapping[str, Any]) -> str:
    if "same_as" in row:
        return f"{row['kernels']}: as {row['same_as']}"
    if "passed" not in row:
        return str(row["kernels"])
    return f"{row['kernels']}: {row['passed']} passed, {len(row['failed'])} failed in {row['seconds']} s"


if __name__ == "__main__":
    main()
