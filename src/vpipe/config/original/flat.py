"""The original's flat keys, turned into the native ones.

`DIRECT` keys only have another place now. The others carry a decision:

- `sync_mode`: asp is pipedream, and the minibatch flows whole (one microbatch); bsp is 1f1b, and it flows as four
  microbatches per stage where its size allows that. `schedule` overrules it.
- `directory`, `module`, `model_type`: 'bert' with 'vgpus=N' is BERT-large (24 layers, 49 blocks; with 'vgpus=8' 48
  layers, 97 blocks) trained by LAMB, as there; `model_type` 'gpt' or 'llama' is such a model in its default size, which
  the original did not have. A `model:` or `optimizer:` section beside overrules it. Files are looked up under
  `directory`.
- `config_file`: its stage maps give the number of ranks, and what it lists by stage.
- `learning_rate_policy`: step alone steps as there, to a tenth every 30 epochs.
- `recompute`: see `PipelineConfig.recompute`; there it did nothing, and the ratios counted alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpipe.config.fields import show
from vpipe.config.original.files import read_stage_maps
from vpipe.config.paths import absolute, is_file_name
from vpipe.config.problems import Problem
from vpipe.errors import ConfigError
from vpipe.words.near import did_you_mean

__all__ = ["DIRECT", "FLAT_KEYS", "Translation", "translate"]

DIRECT: dict[str, str] = {
    "data_dir": "data.data_dir",
    "synthetic_data": "data.synthetic_data",
    "batch_size": "train.batch_size",
    "epochs": "train.epochs",
    "print_frequency": "train.print_frequency",
    "verbose_frequency": "train.verbose_frequency",
    "learning_rate": "optimizer.learning_rate",
    "learning_rate_policy": "optimizer.learning_rate_policy",
    "weight_decay": "optimizer.weight_decay",
    "distributed_backend": "launch.distributed_backend",
    "machines": "launch.machines",
    "partition": "plan.partition",
    "macrobatch": "pipeline.macrobatch",
    "recompute": "pipeline.recompute",
    # Not in the original: what a flat file needs to name any schedule and length.
    "schedule": "pipeline.schedule",
    "num_ranks": "pipeline.num_ranks",
    "num_microbatches": "pipeline.num_microbatches",
    "recompute_ratio": "pipeline.recompute_ratio",
    "memory_limit": "plan.memory_limit",
    "iterations": "train.iterations",
    "warmup_iterations": "optimizer.warmup_iterations",
}
"""Flat keys that only have another place now."""

MEANT: dict[str, str] = {
    "directory": "names the model; folder of `partition` and `config_file`",
    "module": "names the model",
    "model_type": "model.type, data.type",
    "config_file": "pipeline.num_ranks, pipeline.stages_per_rank, and what it lists by stage",
    "sync_mode": "pipeline.schedule: asp is pipedream, bsp is 1f1b",
    "no_input_pipelining": "pipeline.schedule: true is naive",
    "container": "ignored: ranks run where vpipe runs",
}
"""Flat keys that carry a decision, and what they become."""

IGNORED: dict[str, str] = {
    "lr_warmup": "use warmup_iterations",
    "compress_activations": "activations are never compressed",
    "compress_in_gpu": "activations are never compressed",
}
"""Flat keys that have no meaning any more, and what to do instead."""

FLAT_KEYS = (*MEANT, *DIRECT, *IGNORED)
"""Every flat key. `log_directory` is a native key too and needs no translation."""

_SYNC_MODES = {"asp": "pipedream", "bsp": "1f1b"}
_PLANNED_MODELS = ("image_classification", "translation", "speech_to_text")
_OTHER_MODELS = {"gpt": "gpt", "gpt2": "gpt", "llama": "llama"}
_DEEP = re.compile(r"vgpus=8")
"""The original's experiment for eight devices has twice as many layers."""


@dataclass
class Translation:
    """Native settings with the flat key behind each, how errors call them, and what there is to say about them."""

    settings: dict[str, tuple[Any, str]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def translate(flat: Mapping[str, Any], native: Mapping[str, Any], folder: Path) -> Translation:
    """Turn flat keys into native settings.

    Args:
        flat: flat keys and their values.
        native: the native sections given beside them.
        folder: the folder that relative paths start from.
    """
    result = Translation()
    for key in (key for key in flat if key in DIRECT):
        result.settings[DIRECT[key]] = (flat[key], key)
        result.origins[DIRECT[key]] = key
    if is_file_name(flat.get("partition")):
        place = _find(flat["partition"], flat.get("directory"), folder)
        result.settings["plan.partition"] = (str(place), "partition")
    model_type = flat.get("model_type")
    if "model" not in native:
        _translate_model(flat, result)
    elif isinstance(model_type, str) and model_type in _OTHER_MODELS:
        result.settings["model.type"] = (_OTHER_MODELS[model_type], "model_type")
    elif unknown := _unknown_model_type(flat.get("model_type")):
        result.problems.append(Problem(("model.type",), f"{unknown}; the 'model:' section says what is trained"))
    _translate_schedule(flat, result)
    _translate_stage_maps(flat, folder, result)
    if flat.get("container"):
        result.warnings.append(
            f"container = {show(flat['container'])} is ignored: ranks run where vpipe runs; to use the container, "
            "start vpipe inside it"
        )
    for key in (key for key in flat if key in IGNORED):
        result.warnings.append(f"{key} has no meaning any more and is ignored; {IGNORED[key]}")
    return result


def _translate_model(flat: Mapping[str, Any], result: Translation) -> None:
    """Find out the model from the keys that named its source code."""
    given = [key for key in ("model_type", "directory", "module") if flat.get(key) is not None]
    if not given:
        return
    model_type, directory, module = (flat.get(key) for key in ("model_type", "directory", "module"))
    if isinstance(model_type, str) and model_type in _OTHER_MODELS:
        result.settings["model.type"] = (_OTHER_MODELS[model_type], "model_type")
        return
    mistake = ""
    if model_type in _PLANNED_MODELS:
        mistake = f"model_type = {show(model_type)} is not supported yet"
    elif unknown := _unknown_model_type(model_type):
        mistake = unknown
    elif directory is not None and Path(str(directory)).name != "bert":
        mistake = f"directory = {show(directory)} is model code that VPipe does not have"
    elif module is not None and not re.fullmatch(r"vgpus=\d+", str(module)):
        mistake = f"module = {show(module)} is not known; 'vgpus=N' is BERT-large"
    if mistake:
        advice = "VPipe has 'bert', 'gpt' and 'llama'; for another model give a 'model:' section with type: custom"
        result.problems.append(Problem(("model.type", "model.num_layers"), f"{mistake}; {advice}"))
        return
    implied = {"model.type": "bert", "model.size": "large", "data.type": "bert", "optimizer.name": "lamb"}
    result.settings |= {key: (value, given[0]) for key, value in implied.items()}
    if module is not None and _DEEP.fullmatch(str(module)):
        result.settings["model.num_layers"] = (48, "module")


def _unknown_model_type(model_type: object) -> str:
    known = ("bert", *_OTHER_MODELS, *_PLANNED_MODELS)
    if model_type in (None, *known):
        return ""
    return f"model_type = {show(model_type)} is not known{did_you_mean(model_type, known)}"


def _translate_schedule(flat: Mapping[str, Any], result: Translation) -> None:
    """Find out the schedule from the keys that implied it; `schedule` itself has the last word."""
    mode = flat.get("sync_mode")
    if mode is not None and mode not in list(_SYNC_MODES):
        text = f"sync_mode = {show(mode)} is not one of 'asp', 'bsp'{did_you_mean(mode, _SYNC_MODES)}"
        result.problems.append(Problem(("pipeline.schedule",), text))
    elif flat.get("schedule") is not None:
        return
    elif flat.get("no_input_pipelining"):
        result.settings["pipeline.schedule"] = ("naive", "no_input_pipelining")
    elif mode is not None:
        result.settings["pipeline.schedule"] = (_SYNC_MODES[mode], "sync_mode")


def _translate_stage_maps(flat: Mapping[str, Any], folder: Path, result: Translation) -> None:
    """Take ranks, stages and what is listed by stage from the maps of `config_file`."""
    name = flat.get("config_file")
    if name is None:
        return
    try:
        if not isinstance(name, str):
            raise ConfigError(f"{show(name)} is not a path")
        maps = read_stage_maps(_find(name, flat.get("directory"), folder))
    except ConfigError as error:
        result.problems.append(Problem(("pipeline.num_ranks",), f"config_file = {error}"))
        return
    num_ranks = maps.num_ranks or maps.num_stages
    if num_ranks is not None and maps.num_stages is not None:
        result.settings.setdefault("pipeline.num_ranks", (num_ranks, "config_file"))
        result.settings["pipeline.stages_per_rank"] = (maps.num_stages // num_ranks, "config_file")
    for key, value in maps.options.items():
        result.settings[f"pipeline.{key}"] = (value, "config_file")
        result.origins[f"pipeline.{key}"] = key


def _find(name: str, directory: object, folder: Path) -> Path:
    """Find a file of the original's experiment folder: under `directory` here or one folder up, else just here."""
    folders = [folder]
    if isinstance(directory, str):
        folders = [folder / directory, folder.parent / directory, folder]
    places = [Path(absolute(name, each)) for each in folders]
    return next((place for place in places if place.is_file()), places[0])
