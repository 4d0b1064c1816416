"""Predict the peak of every configuration, then run it and compare with what its ledger says.

python -m benchmarks.memory.run [--only WORDS] [--others] [--out FILE]
python -m benchmarks.memory.run --again FILE      predict anew what the runs of a file of results held
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import environment, format_table, write_results
from benchmarks.memory.configurations import CONFIGURATIONS, OTHERS, Configuration
from benchmarks.memory.ranks import RankRun, measure_profile, run_config

from vpipe.config.planning.to_plan import to_recipe
from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy
from vpipe.planner.cost.loads import stage_loads
from vpipe.planner.cost.memory import RankMemory, rank_memory, stage_bytes
from vpipe.planner.profile.profile import Profile
from vpipe.schedule.schedule import uses_split_backward
from vpipe.words.units import format_bytes

Row = dict[str, Any]

PROFILES = Path(__file__).parent / "results" / "profiles"


def predict(configuration: Configuration, profile: Profile) -> tuple[RankMemory, ...]:
    """Return what every rank is predicted to hold at its peak."""
    config = configuration.config()
    recipe = to_recipe(config).bare()
    schedule = recipe.build() if recipe.synchronous else recipe.build(6)
    blocks, is_split = profile.at(config.microbatch_size).blocks, uses_split_backward(schedule)
    policies = [Policy(name) for name in config.plan.policies or ()]
    cuts = Partition.uniform(len(blocks), schedule.num_stages).ranges
    stages = [
        stage_bytes(blocks, start, stop, policies, is_split=is_split, is_ahead=stage in configuration.ahead)
        for stage, (start, stop) in enumerate(cuts)
    ]
    return rank_memory(schedule, stage_loads(schedule), stages)


def compare(configuration: Configuration, predicted: tuple[RankMemory, ...], runs: list[RankRun]) -> Row:
    """Put prediction and measurement beside each other, per rank."""
    ranks: list[Row] = [
        {
            "predicted": {**asdict(memory), "total": memory.total},
            "measured": {**run.at_peak, "total": run.peak_bytes},
            "action": run.action,
            "error": round(memory.total / run.peak_bytes - 1, 4),
        }
        for memory, run in zip(predicted, runs, strict=True)
    ]
    return {"name": configuration.name, "ranks": ranks, "error": max((rank["error"] for rank in ranks), key=abs)}


def show(rows: list[Row]) -> None:
    """Print the table: of each configuration the rank that holds most, and the worst error of any rank."""
    lines = []
    for row in rows:
        rank = max(row["ranks"], key=lambda each: each["measured"]["total"])
        predicted, measured = (format_bytes(rank[name]["total"]) for name in ("predicted", "measured"))
        lines.append([row["name"], predicted, measured, f"{rank['error']:+.1%}", f"{row['error']:+.1%}"])
    print(format_table(["configuration", "predicted", "measured", "error", "worst rank"], lines))
    errors = [abs(rank["error"]) for row in rows for rank in row["ranks"]]
    print(json.dumps({"mean_error": round(sum(errors) / len(errors), 4), "worst_error": max(errors)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the configurations whose name has these words")
    parser.add_argument("--others", action="store_true", help="run those that the model was not made with")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "peaks.json")
    parser.add_argument("--profiles", type=Path, help="a folder whose profiles are used, if it has them")
    parser.add_argument("--again", type=Path, help="a file of results whose runs are not run again")
    arguments = parser.parse_args()
    if arguments.again is not None:
        predict_again(arguments.again, arguments.profiles or PROFILES)
        return
    surroundings = environment()
    possible = OTHERS if arguments.others else CONFIGURATIONS
    chosen = [each for each in possible if all(word in each.name for word in arguments.only.split())]
    if arguments.profiles is None:
        for model in {each.model for each in chosen}:
            (PROFILES / f"{model}.json").unlink(missing_ok=True)
    folder = arguments.profiles or PROFILES
    profiles = {model: _profile(model, chosen, folder) for model in {each.model for each in chosen}}
    rows = []
    for configuration in chosen:
        predicted = predict(configuration, profiles[configuration.model])
        rows.append(compare(configuration, predicted, run_config(configuration.config())))
        print(f"{rows[-1]['error']:+7.1%}  {configuration.name}", flush=True)
        write_results(arguments.out, {"environment": surroundings, "rows": rows})
    show(rows)


def predict_again(path: Path, folder: Path) -> None:
    """Predict what the runs of a file of results held, from the profiles of then, and write that into the file."""
    results, named = json.loads(path.read_text()), {each.name: each for each in (*CONFIGURATIONS, *OTHERS)}
    for row in results["rows"]:
        configuration = named[row["name"]]
        predicted = predict(configuration, _profile(configuration.model, [configuration], folder))
        for rank, memory in zip(row["ranks"], predicted, strict=True):
            rank["predicted"] = {**asdict(memory), "total": memory.total}
            rank["error"] = round(memory.total / rank["measured"]["total"] - 1, 4)
        row["error"] = max((rank["error"] for rank in row["ranks"]), key=abs)
    show(results["rows"])
    write_results(path, results)


def _profile(model: str, chosen: list[Configuration], folder: Path) -> Profile:
    kept = folder / f"{model}.json"
    if kept.exists():
        return Profile.from_json(kept.read_text())
    first = next(each for each in chosen if each.model == model)
    profile = measure_profile(first.config())
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(profile.to_json())
    return profile


if __name__ == "__main__":
    main()
