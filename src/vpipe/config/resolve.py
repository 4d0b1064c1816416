"""Fill in what a run leaves open but its file, its folder and its other keys decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vpipe.config.checks.run import is_synchronous
from vpipe.config.fields import show
from vpipe.config.model_sizes import BERT_SIZES
from vpipe.config.original.files import read_partition_file
from vpipe.config.paths import PARTITIONS, is_file_name
from vpipe.config.planning.profiled import other_keys
from vpipe.config.problems import Problem
from vpipe.config.run import RunConfig
from vpipe.config.taken_plan import take_plan
from vpipe.config.text import parse_json, read_text
from vpipe.config.tree import Tree, get_key, set_key
from vpipe.errors import ConfigError
from vpipe.plan.waiting import ENOUGH
from vpipe.words.near import did_you_mean

__all__ = ["read_initial_model", "read_partition", "resolve_run"]

_VOCABULARIES = {"bert": 30522, "gpt": 50257, "llama": 32000}
_SYNTHETIC_LENGTH = 128
_ORIGINAL_STEP_EPOCHS = 30
# Our names, and those in the config.json of a transformers BERT.
_TRANSFORMERS_NAMES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}


def read_initial_model(tree: Tree) -> list[Problem]:
    """Take the model's numbers that are not given from the folder it starts from; return what is wrong."""
    folder = get_key(tree, "model.init_from")
    if not isinstance(folder, str) or get_key(tree, "model.type") not in (None, "bert"):
        return []
    try:
        path = Path(folder) / "config.json"
        settings = parse_json(read_text(path), str(path))
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: is not a JSON object")
    except ConfigError as error:
        return [Problem(("model.init_from", "model.num_layers", "model.num_heads"), f"model.init_from = {error}")]
    sized = BERT_SIZES["base"] if get_key(tree, "model.size") is not None else {}
    known = {key: settings[name] for key, name in _TRANSFORMERS_NAMES.items() if name in settings and key not in sized}
    tree["model"] = known | tree["model"]
    return []


def read_partition(tree: Tree) -> tuple[list[Problem], list[str]]:
    """Replace a plan file by what it says, and recompute true or false by what that means beside its ratios.

    Returns:
        What is wrong, and what to warn of.
    """
    problems: list[Problem] = []
    warnings: list[str] = []
    name = get_key(tree, "plan.partition")
    if is_file_name(name):
        try:
            content = read_partition_file(Path(name))
        except ConfigError as error:
            near = "" if Path(name).is_file() else did_you_mean(Path(name).name, PARTITIONS)
            keys = ("plan.partition", "pipeline.recompute_ratio")
            problems.append(Problem(keys, f"plan.partition = {error}{near}"))
            set_key(tree, "plan.partition", "uniform")
        else:
            warnings = take_plan(tree, content)
    pipeline = tree.setdefault("pipeline", {})
    if not isinstance(pipeline, dict):
        return problems, warnings
    mode = pipeline.get("recompute")
    if mode is True and get_key(tree, "plan.partition") == "auto" and pipeline.get("recompute_ratio") in (None, 0):
        mode = pipeline["recompute"] = None  # the planner may
    return problems, warnings + (_resolve_recompute(pipeline, mode) if isinstance(mode, bool) else [])


def _resolve_recompute(pipeline: Tree, wanted: bool) -> list[str]:
    """Turn recompute true or false into a mode: true keeps given ratios, false overrules them. Return warnings."""
    ratio = pipeline.get("recompute_ratio")
    nothing = ratio in (None, 0) or (isinstance(ratio, list) and not any(ratio))
    if not wanted:
        pipeline |= {"recompute": "never", "recompute_ratio": 0.0}
        return [] if nothing else [f"recompute is false, so recompute_ratio = {show(ratio)} is ignored"]
    pipeline["recompute"] = "always" if ratio in (None, 0) else None
    if nothing and isinstance(ratio, list):
        return [f"recompute is true and recompute_ratio is {show(ratio)}: nothing is recomputed"]
    return []


def resolve_run(run: RunConfig, tree: Tree, is_flat: bool) -> tuple[RunConfig, list[str]]:
    """Fill in the ranks, the vocabulary of synthetic data, and microbatches and steps that a flat file did not give.

    Returns:
        The run, and what to warn of.
    """
    pipeline: dict[str, Any] = {"num_ranks": run.num_ranks}
    warnings = []
    if get_key(tree, "pipeline.num_microbatches") is None:
        waits = run.pipeline.schedule != "naive" and is_synchronous(run) is not False
        if is_flat and waits and run.num_stages > 1:
            pipeline["num_microbatches"] = _microbatches_of(run)
        elif is_flat and (waits or run.pipeline.macrobatch):
            pipeline["num_microbatches"] = run.num_stages
        if is_flat and run.pipeline.macrobatch:
            warnings.append(
                f"macrobatch: a batch of {run.train.batch_size} flows as {run.num_stages} microbatches and gives one "
                "update; the original put as many whole batches into an update"
            )
    sections = {
        "pipeline": run.pipeline.model_copy(update=pipeline),
        "model": run.model.model_copy(update=_synthetic_vocabulary(run)),
        "data": run.data.model_copy(update=_synthetic_length(run)),
        "optimizer": run.optimizer.model_copy(update=_original_steps(run) if is_flat else {}),
    }
    run, told = _without_another_prediction(run.model_copy(update=sections))
    return run, [*warnings, *told]


def _microbatches_of(run: RunConfig) -> int:
    """Return four microbatches per stage, or as many as the batch can be cut into equally."""
    counts = (times * run.num_stages for times in range(ENOUGH, 1, -1))
    return next((count for count in counts if run.train.batch_size % count == 0), run.num_stages)


def _without_another_prediction(run: RunConfig) -> tuple[RunConfig, list[str]]:
    """Leave out what was predicted of another model, and say so."""
    measured = (run.plan.predicted or {}).get("made_of")
    other = other_keys(run, {key: str(value) for key, value in measured.items()}) if isinstance(measured, dict) else []
    if not other:
        return run, []
    text = f"plan.partition was planned with {'; with '.join(other)}: the prediction does not hold"
    return run.model_copy(update={"plan": run.plan.model_copy(update={"predicted": None})}), [text]


def _original_steps(run: RunConfig) -> dict[str, int]:
    """Return the step size that the original had in its code (PipeDream's `adjust_learning_rate`)."""
    optimizer = run.optimizer
    given = optimizer.step_size_iterations is not None or optimizer.step_size_epochs is not None
    return {} if given or optimizer.learning_rate_policy != "step" else {"step_size_epochs": _ORIGINAL_STEP_EPOCHS}


def _is_synthetic(run: RunConfig) -> bool:
    """Tell whether what prepared data would have told has to be filled in."""
    return run.data.type == "bert" and run.data.synthetic_data


def _synthetic_vocabulary(run: RunConfig) -> dict[str, int]:
    size = _VOCABULARIES.get(run.model.type)
    return {"vocab_size": size} if _is_synthetic(run) and size and run.model.vocab_size is None else {}


def _synthetic_length(run: RunConfig) -> dict[str, int]:
    return {"sequence_length": _SYNTHETIC_LENGTH} if _is_synthetic(run) and run.data.sequence_length is None else {}
