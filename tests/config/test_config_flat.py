"""The original's flat keys mean what they meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vpipe.config import LoadedConfig, build_config, read_config
from vpipe.config.original.flat import FLAT_KEYS
from vpipe.config.planning.to_plan import to_plan
from vpipe.config.problems import native_keys
from vpipe.config.text import format_yaml
from vpipe.errors import ConfigError

FLAT: dict[str, Any] = {
    "directory": "bert",
    "module": "vgpus=4",
    "partition": "vgpus=4/vpipe.json",
    "config_file": "vgpus=4/mp_conf.json",
    "machines": ["localhost:0", "localhost:1", "localhost:2", "localhost:3"],
    "sync_mode": "asp",
    "distributed_backend": "gloo",
    "model_type": "bert",
    "data_dir": "/path/to/dataset",
    "log_directory": "/path/to/logs",
    "batch_size": 16,
    "learning_rate": 0.03,
    "learning_rate_policy": "polynomial",
    "weight_decay": 0.01,
    "epochs": 2,
    "print_frequency": 100,
    "verbose_frequency": 0,
    "recompute": True,
    "macrobatch": False,
    "synthetic_data": False,
}
MAPS = {
    "module_to_stage_map": [0, 1, 2, 3, 3],
    "stage_to_rank_map": {"0": [0], "1": [1], "2": [2], "3": [3]},
    "stage_to_depth_map": {"0": 6, "1": 4, "2": 2, "3": 0},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the original laid it out, with `configs` beside `bert`."""
    experiment = tmp_path / "bert" / "vgpus=4"
    experiment.mkdir(parents=True)
    (experiment / "vpipe.json").write_text('{"partition": [12, 13, 13, 11], "recompute_ratio": [0.3, 0, 0, 0]}')
    (experiment / "plain.json").write_text('{"partition": [12, 13, 13, 11]}')
    (experiment / "mp_conf.json").write_text(json.dumps(MAPS))
    (tmp_path / "configs").mkdir()
    return tmp_path


def load(folder: Path, *overrides: str, **changes: Any) -> LoadedConfig:
    content = {key: value for key, value in {**FLAT, **changes}.items() if value != "absent"}
    path = folder / "run.yml"
    path.write_text(format_yaml(content))
    return read_config(path, overrides)


def error_of(folder: Path, *overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load(folder, *overrides, **changes)
    return str(error.value).removeprefix(f"{folder}/run.yml: ").replace(f"{folder}/bert/", "")


def test_every_key_arrives(folder: Path) -> None:
    run, warnings = load(folder)
    assert warnings == ()
    assert (run.model.type, run.model.size, run.model.num_layers, run.num_blocks) == ("bert", "large", 24, 49)
    assert (run.pipeline.schedule, run.num_ranks, run.num_stages, run.pipeline.num_microbatches) == (
        "pipedream",
        4,
        4,
        1,
    )
    assert run.plan.partition == [12, 13, 13, 11]
    assert run.recompute_ratios == [0.3, 0, 0, 0]
    assert run.pipeline.stage_to_depth_map == [6, 4, 2, 0]
    assert run.launch.machines == FLAT["machines"]
    assert run.launch.distributed_backend == "gloo"
    assert (run.data.data_dir, run.log_directory) == (Path("/path/to/dataset"), Path("/path/to/logs"))
    assert (run.train.batch_size, run.train.epochs, run.train.iterations) == (16, 2, None)
    assert (run.train.print_frequency, run.train.verbose_frequency) == (100, 0)
    assert (run.optimizer.name, run.optimizer.learning_rate) == ("lamb", 0.03)
    assert (run.optimizer.learning_rate_policy, run.optimizer.weight_decay) == ("polynomial", 0.01)


def test_files_are_found_where_the_original_kept_them(folder: Path) -> None:
    (folder / "configs" / "run.yml").write_text(format_yaml(FLAT))
    assert read_config(folder / "configs" / "run.yml").config.plan.partition == [12, 13, 13, 11]
    assert (
        load(folder, directory="absent", partition="bert/vgpus=4/vpipe.json", config_file="absent").config.num_ranks
        == 4
    )


@pytest.mark.parametrize(
    ("changes", "schedule", "num_microbatches"),
    [
        ({"sync_mode": "asp"}, "pipedream", 1),
        ({"sync_mode": "bsp"}, "1f1b", 16),
        ({"sync_mode": "bsp", "batch_size": 24}, "1f1b", 12),
        ({"sync_mode": "bsp", "batch_size": 8}, "1f1b", 8),
        ({"sync_mode": "bsp", "batch_size": 4}, "1f1b", 4),
        ({"sync_mode": "bsp", "num_microbatches": 8}, "1f1b", 8),
        ({"sync_mode": "bsp", "schedule": "gpipe", "config_file": "absent"}, "gpipe", 16),
        ({"sync_mode": "asp", "schedule": "gpipe", "config_file": "absent"}, "gpipe", 16),
        ({"sync_mode": "bsp", "no_input_pipelining": True, "config_file": "absent"}, "naive", 1),
        ({"sync_mode": "asp", "pipeline": {"num_microbatches": 2}}, "pipedream", 2),
        ({"sync_mode": "asp", "pipeline": {"schedule": "1f1b"}}, "1f1b", 16),
    ],
    ids=str,
)
def test_sync_mode(folder: Path, changes: dict[str, Any], schedule: str, num_microbatches: int) -> None:
    pipeline = load(folder, **changes).config.pipeline
    assert (pipeline.schedule, pipeline.num_microbatches) == (schedule, num_microbatches)


def test_what_few_microbatches_cost_is_told(folder: Path) -> None:
    (told,) = load(folder, sync_mode="bsp", batch_size=4).warnings
    assert told == (
        "num_microbatches is not given: a batch of 4 flows as 4 through 4 stages: each of 4 ranks waits for 43% of the "
        "time (stages of equal time); a batch of 4 cannot be cut into more; with a batch_size of 16 it could flow as 16"
    )
    (told,) = load(folder, sync_mode="bsp", batch_size=64).warnings
    assert told == (
        "num_microbatches is not given: a batch of 64 flows as 16 through 4 stages: each of 4 ranks waits for 16% of "
        "the time"
    )


@pytest.mark.parametrize(("model_type", "model"), [("gpt", "gpt"), ("gpt2", "gpt"), ("llama", "llama")])
def test_other_model_types(folder: Path, model_type: str, model: str) -> None:
    changes = {"model_type": model_type, "directory": "absent", "module": "absent", "config_file": "absent"}
    run = load(folder, **changes, partition="uniform").config
    assert (run.model.type, run.model.num_layers, run.data.type) == (model, 12, "bert")


def test_the_experiment_for_eight_devices_is_twice_as_deep(folder: Path) -> None:
    run = load(folder, module="vgpus=8", partition="uniform").config
    assert (run.model.num_layers, run.num_blocks, run.model.size) == (48, 97, "large")


def test_overrides_go_through_the_same_translation(folder: Path) -> None:
    run = load(folder, "sync_mode=bsp", "batch_size=32", "pipeline.num_microbatches=8", "model.hidden_size=128").config
    assert (run.pipeline.schedule, run.train.batch_size, run.microbatch_size) == ("1f1b", 32, 4)
    assert (run.model.hidden_size, run.model.num_layers) == (128, 24)


def test_a_flat_override_beats_a_native_key() -> None:
    run = build_config(
        {"data": {"synthetic_data": True}, "train": {"iterations": 1}, "pipeline": {"schedule": "gpipe"}},
        overrides=["sync_mode=asp", "batch_size=4"],
    )
    assert (run.pipeline.schedule, run.train.batch_size) == ("pipedream", 4)


@pytest.mark.parametrize(
    ("recompute", "partition", "ratios"),
    [
        (True, "vgpus=4/vpipe.json", [0.3, 0, 0, 0]),
        ("absent", "vgpus=4/vpipe.json", [0.3, 0, 0, 0]),
        (False, "vgpus=4/vpipe.json", [0, 0, 0, 0]),
        (True, "vgpus=4/plain.json", [1, 1, 1, 1]),
        ("absent", "vgpus=4/plain.json", [0, 0, 0, 0]),
        (False, [12, 13, 13, 11], [0, 0, 0, 0]),
    ],
)
def test_recompute(folder: Path, recompute: object, partition: object, ratios: list[float]) -> None:
    assert load(folder, recompute=recompute, partition=partition).config.recompute_ratios == ratios


def test_native_sections_beside_flat_keys(folder: Path) -> None:
    run = load(folder, model={"num_layers": 24, "hidden_size": 64}, optimizer={"name": "adamw", "eps": 1e-6}).config
    assert (run.model.size, run.model.hidden_size) == (None, 64)
    assert (run.optimizer.name, run.optimizer.eps, run.optimizer.learning_rate) == ("adamw", 1e-6, 0.03)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ((), (None, 30)),
        (("optimizer.step_size_iterations=5",), (5, None)),
        (("optimizer.step_size_epochs=2",), (None, 2)),
        (("learning_rate_policy=polynomial",), (None, None)),
    ],
)
def test_steps_are_as_far_apart_as_the_original_had_them_unless_given(
    folder: Path, overrides: tuple[str, ...], steps: tuple[int | None, int | None]
) -> None:
    optimizer = load(folder, *overrides, learning_rate_policy="step").config.optimizer
    assert (optimizer.step_size_iterations, optimizer.step_size_epochs) == steps
    assert optimizer.step_gamma == 0.1


def test_macrobatch_flows_as_many_microbatches_as_stages(folder: Path) -> None:
    run, warnings = load(folder, macrobatch=True, config_file="absent")
    assert (run.pipeline.num_microbatches, to_plan(run).options) == (4, {"macrobatch": True})
    assert warnings == (
        "macrobatch: a batch of 16 flows as 4 microbatches and gives one update; the original put as many whole "
        "batches into an update",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"lr_warmup": True}, "lr_warmup has no meaning any more and is ignored; use warmup_iterations"),
        (
            {"compress_activations": False},
            "compress_activations has no meaning any more and is ignored; activations are never compressed",
        ),
        (
            {"container": "/vpipe.sif"},
            "container = '/vpipe.sif' is ignored: ranks run where vpipe runs; to use the container, start vpipe inside "
            "it",
        ),
        ({"recompute": False}, "recompute is false, so recompute_ratio = [0.3, 0.0, 0.0, 0.0] is ignored"),
        (
            {"recompute_ratio": [0, 0, 0, 0]},
            "recompute is true and recompute_ratio is [0, 0, 0, 0]: nothing is recomputed",
        ),
    ],
    ids=str,
)
def test_warnings(folder: Path, changes: dict[str, Any], warning: str) -> None:
    assert load(folder, **changes).warnings == (warning,)


ADVICE = "; VPipe has 'bert', 'gpt' and 'llama'; for another model give a 'model:' section with type: custom"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sync_mode": "asq"}, "sync_mode = 'asq' is not one of 'asp', 'bsp'; did you mean 'asp'?"),
        ({"model_type": "translation"}, "model_type = 'translation' is not supported yet" + ADVICE),
        ({"model_type": "brt"}, "model_type = 'brt' is not known; did you mean 'bert'?" + ADVICE),
        ({"directory": "gnmt", "partition": "uniform", "config_file": "absent"},
         "directory = 'gnmt' is model code that VPipe does not have" + ADVICE),
        ({"module": "large_4"}, "module = 'large_4' is not known; 'vgpus=N' is BERT-large" + ADVICE),
        ({"batch_sise": 4}, "batch_sise = 4 is not a known key; did you mean 'batch_size'?"),
        ({"modle": "large_4"}, "modle = 'large_4' is not a known key; did you mean 'module'?"),
        ({"epochs": "two"}, "epochs = 'two' is not a whole number of at least 1, or null"),
        ({"batch_size": 2, "num_microbatches": 3},
         "batch_size = 2 cannot be cut into num_microbatches = 3 microbatches with samples; use a batch size of at "
         "least 3, or at most 2 microbatches"),
        ({"train": {"batch_size": 8}}, "batch_size and train.batch_size are the same setting, given twice; keep one"),
        ({"machines": ["localhost:0"]},
         "machines = ['localhost:0'] lists 1 for 4 ranks (pipeline.num_ranks); give one 'host:device' per rank"),
        ({"machines": ["a:0", "a:1", "a:2", "a:3"]},
         "machines: 'a' is another machine; starting ranks over ssh is not supported yet; use 'localhost:0', or "
         "start the ranks yourself with torchrun and leave machines out"),
        ({"partition": "none.json"}, "partition = none.json: no such file"),
        ({"partition": "parameter"}, "partition = parameter: no such file; did you mean 'parameters'?"),
        ({"partition": [12, 13, 13, 10]},
         "partition = [12, 13, 13, 10]: has 48 blocks in all, and the model has 49; add 1"),
        ({"config_file": 3}, "config_file = 3 is not a path"),
        ({"config_file": "none.json"}, "config_file = none.json: no such file"),
        ({"macrobatch": True, "sync_mode": "bsp"},
         "macrobatch = true needs pipeline.schedule = pipedream or pipedream-2bw, not '1f1b'"),
        ({"epochs": "absent"}, "train.epochs and train.iterations are both missing; give one of them"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_wording(folder: Path, changes: dict[str, Any], message: str) -> None:
    assert error_of(folder, **changes) == message


def test_flat_and_native_keys_do_not_collide() -> None:
    assert set(FLAT_KEYS).isdisjoint(native_keys())


def test_a_mistyped_model_is_told_beside_a_model_section():
    with pytest.raises(
        ConfigError, match=r"model_type = 'bertt' is not known; did you mean 'bert'\?; the 'model:' sec"
    ):
        build_config({"model_type": "bertt", "batch_size": 4, "model": {"num_layers": 2}})
    whole = {"model_type": "bert", "batch_size": 4, "iterations": 1, "synthetic_data": True, "model": {"num_layers": 2}}
    assert build_config(whole).model.num_layers == 2


def test_an_unknown_key_of_a_flat_file_is_answered_with_the_flat_keys():
    with pytest.raises(ConfigError, match=r"zzz = 1 is not a known key; known here: .*seed, .*, learning_rate, .*"):
        build_config({"batch_size": 4, "zzz": 1})


def test_ratios_alone_leave_the_cut_alone(folder: Path) -> None:
    (folder / "ratios.json").write_text('{"recompute_ratio": [0.5, 0, 0, 0]}')
    run = load(folder, partition="../ratios.json", sync_mode="bsp").config
    assert (run.plan.partition, run.pipeline.recompute_ratio) == ("uniform", [0.5, 0.0, 0.0, 0.0])


def test_a_partition_of_layers_is_told_in_blocks(folder: Path) -> None:
    told = error_of(folder, partition=[6, 6, 6, 6])
    assert "has 24 blocks in all, and the model has 49; add 25 (24 is the number of layers: each is two blocks" in told
    assert "in blocks this is [13, 12, 12, 12])" in told
    gpt = {"model": {"type": "gpt", "num_layers": 4}, "partition": [2, 2], "config_file": "absent", "num_ranks": 2}
    told = error_of(folder, **gpt, machines="absent", model_type="absent", directory="absent", module="absent")
    assert "and the last the output; in blocks this is [5, 5])" in told
