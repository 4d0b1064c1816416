"""GPipe, PipeDream and VPipe on the same model, data and number of samples: throughput, memory, loss.

python -m benchmarks.three_way.run [--num-rounds 3] [--contestants NAME...] [--out FILE]

Needs the prepared data of `scripts/demo`, or: vpipe data prepare bert --out data/bert
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Contestant, environment, format_table, parse_run, spread, write_results

CONFIGS = {"GPipe": "narrow_4gpipe.yml", "PipeDream": "narrow_4pipedream.yml", "VPipe": "narrow_4vpipe.yml"}
CONTESTANTS = tuple(Contestant(name, "vpipe") for name in CONFIGS)
MIB = 1 << 20


def train(name: str) -> dict[str, Any]:
    """Train one contestant's config from the start and return its summary."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "vpipe",
            "train",
            f"configs/{CONFIGS[name]}",
            "--set",
            f"log_directory={folder}",
        ]
        subprocess.run([*command, "--set", "train.save_model=false"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        summary: dict[str, Any] = json.loads((Path(folder) / "latest" / "summary.json").read_text())
        return summary


def main() -> None:
    default_out = Path(__file__).parent / "results" / "three_way.json"
    contestants, num_rounds, out = parse_run(__doc__, CONTESTANTS, default_out)
    surroundings = environment()
    summaries: dict[str, list[dict[str, Any]]] = {item.name: [] for item in contestants}
    for round_ in range(num_rounds):
        for item in contestants:
            summaries[item.name].append(train(item.name))
            rate = summaries[item.name][-1]["samples_per_second"]
            print(f"  round {round_ + 1}/{num_rounds}  {item.name:<12} {rate:7.1f} samples/s", flush=True)
    rows, results = [], []
    for name, runs in summaries.items():
        rates = spread([run["samples_per_second"] for run in runs])
        memory = [
            round(statistics.median(values) / MIB)
            for values in zip(*(run["peak_memory_bytes"] for run in runs), strict=True)
        ]
        last = runs[-1]
        results.append(
            {
                "name": name,
                "samples_per_second": rates,
                "peak_memory_mib": memory,
                "num_samples": last["num_samples"],
                "final_loss": last["final_loss"],
                "eval_loss": last["eval_loss"],
                "bubble_fraction": spread([run["bubble_fraction"] for run in runs]),
            }
        )
        rows.append(
            [
                name,
                f"{rates['median']:.1f} ({rates['min']:.1f} to {rates['max']:.1f})",
                " ".join(map(str, memory)),
                f"{last['final_loss']:.4f}",
                f"{last['eval_loss']:.4f}",
            ]
        )
    write_results(out, {"environment": surroundings, "results": results})
    header = ["contestant", "samples/s", "peak memory per rank [MiB]", "loss", "held-out loss"]
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
