"""What the ranks of the training tests run, and the small BERT they train."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpipe.config import load_config
from vpipe.data.bert.meta import BertOptions
from vpipe.data.bert.prepare import prepare_bert
from vpipe.launch.local import launch_local
from vpipe.launch.run_directory import point_latest_to
from vpipe.runtime.comm.world import World
from vpipe.train import trainer
from vpipe.train.trainer import Trainer
from vpipe.verify.verify import pipeline_directory, run_pipeline

HERE = Path(__file__).parent

CONFIG = """
log_directory: runs
seed: 4
model: {type: bert, num_layers: 2, hidden_size: 16, num_heads: 2, max_position_embeddings: 32, dropout: 0.2}
data: {data_dir: set, sequence_length: 32, masking: dynamic}
pipeline: {schedule: 1f1b, num_microbatches: 4}
optimizer: {name: adamw, learning_rate: 3e-3, clip_grad_norm: 1.0, warmup_iterations: 3, weight_decay: 0.01}
train: {batch_size: 8, iterations: 11, print_frequency: 5, eval_frequency: 4, eval_batch_size: 5}
launch: {device: cpu, threads_per_rank: 1}
"""


def write_config(folder: Path) -> Path:
    """Write the run's file and its data set into `folder`."""
    rng = random.Random(1)
    words = ["rain", "spain", "falls", "plain", "near", "some", "tall", "green", "hill", "noon"]
    documents = [
        [" ".join(rng.choices(words, k=rng.randint(3, 9))).capitalize() + "." for _ in range(rng.randint(2, 5))]
        for _ in range(24)
    ]
    (folder / "text.txt").write_text("\n\n".join("\n".join(document) for document in documents))
    options = BertOptions(vocab_size=64, sequence_length=32, eval_fraction=0.4, seed=3, limit_samples=28)
    prepare_bert([folder / "text.txt"], folder / "set", options)
    (folder / "run.yml").write_text(CONFIG)
    return folder / "run.yml"


CHAIN_CONFIG = """
log_directory: runs
model: {type: custom, entry: 'chain_toys.py:chain'}
data: {type: custom, entry: 'chain_toys.py:data'}
pipeline: {schedule: 1f1b, num_ranks: 2, num_microbatches: 4}
optimizer: {name: adamw, learning_rate: 1e-2}
train: {batch_size: 8, iterations: 6}
launch: {device: cpu, threads_per_rank: 1}
"""


def write_chain_config(folder: Path) -> Path:
    """Write the file of a run with a model and data of the user's own into `folder`."""
    shutil.copy(HERE / "chain_toys.py", folder)
    (folder / "chain.yml").write_text(CHAIN_CONFIG)
    return folder / "chain.yml"


def verify_many(arguments: Sequence[str]) -> None:
    """Be one rank of the pipelines of several verifications: names with overrides in JSON."""
    with World.join(timeout_seconds=60, backend="gloo") as group:
        for name, (path, overrides) in json.loads(arguments[0]).items():
            directory = Path(path).parent / name
            pipeline_directory(directory).mkdir(parents=True, exist_ok=True)
            run_pipeline(load_config(path, overrides), 2, directory, group)


def launch_verifications(folder: Path, num_ranks: int, runs: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    """Run the pipelines of several verifications on `num_ranks` ranks."""
    launch = folder / f"verify.{num_ranks}"
    launch.mkdir()
    launch_local(
        ["train_toys:verify_many", json.dumps(runs)],
        num_ranks,
        run_directory=launch,
        environment={"PYTHONPATH": str(HERE)},
    )


def train_many(arguments: Sequence[str]) -> None:
    """Be one rank of several runs, one after another: `arguments` are a YAML file and names with overrides in JSON."""
    path, runs = Path(arguments[0]), json.loads(arguments[1])
    with World.join(timeout_seconds=60, backend="gloo") as group:
        for name, overrides in runs.items():
            config = load_config(path, [*overrides, f"pipeline.num_ranks={group.num_ranks}"])
            directory = path.parent / name
            directory.mkdir(exist_ok=True)
            Trainer(config, directory, group).run()


def begin_slowly(arguments: Sequence[str]) -> None:
    """Be one rank of a run, of which rank 0 takes its time to say what it is."""
    path = Path(arguments[0])
    with World.join(timeout_seconds=60, backend="gloo") as group:
        if group.rank == 0:
            describe = trainer.describe_plan
            trainer.describe_plan = lambda *given: (time.sleep(1), describe(*given))[1]  # type: ignore[attr-defined]
        directory = path.parent / "runs" / "slow"
        config = load_config(path, [f"pipeline.num_ranks={group.num_ranks}", "data.masking=static"])
        Trainer(config, directory, group).run(point_latest_to)


def launch_many(path: Path, num_ranks: int, runs: Mapping[str, Sequence[str]]) -> None:
    """Run `train_many` on `num_ranks` ranks; each run's files are in a folder of its name beside `path`."""
    launch = path.parent / f"launch.{num_ranks}.{next(iter(runs))}"
    launch.mkdir()
    launch_local(
        ["train_toys:train_many", str(path), json.dumps(runs)],
        num_ranks,
        run_directory=launch,
        environment={"PYTHONPATH": str(HERE)},
    )


def records(directory: Path) -> list[dict[str, Any]]:
    """Read a run's metrics without those that are times."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("samples_per_second", "elapsed_s")} for line in lines
    ]
