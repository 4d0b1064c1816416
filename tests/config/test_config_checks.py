"""The wording of every mistake that only shows when several keys are seen together."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vpipe.config import build_config
from vpipe.errors import ConfigError
from vpipe.schedule.registry import SCHEDULES

RUN: dict[str, Any] = {
    "model": {"num_layers": 24, "hidden_size": 64, "num_heads": 2},
    "data": {"synthetic_data": True},
    "pipeline": {"schedule": "1f1b", "num_ranks": 4, "num_microbatches": 4},
    "plan": {"partition": [12, 13, 13, 11]},
    "train": {"batch_size": 16, "iterations": 3},
}


def taking(option: str) -> str:
    """The schedules that take an option: more may come."""
    return " or ".join(name for name, entry in SCHEDULES.items() if option in entry.options)


def with_changes(changes: dict[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(RUN)
    for key, value in changes.items():
        section, _, leaf = key.partition(".")
        tree.setdefault(section, {})[leaf] = value
    return tree


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pipeline.schedule": "gpipe", "pipeline.recompute": "except_last"},
        {"pipeline.schedule": "pipedream", "pipeline.macrobatch": True},
        {"pipeline.schedule": "pipedream", "pipeline.vertical_sync": True},
        {"pipeline.stage_to_depth_map": [6, 4, 2, 0]},
        {"pipeline.stage_to_depth_map": {"0": 6, 1: 4, "2": 2, "3": 0}},
        {"pipeline.recompute_ratio": [0.3, 0, 0, 0]},
        {"model.tie_weights": True},
        {"model.tie_weights": True, "pipeline.schedule": "pipedream", "pipeline.num_ranks": 1, "plan.partition": [49]},
        {"launch.machines": ["localhost:0", "127.0.0.1:1", "localhost:2", "localhost:3"]},
        {"launch.machines": ["localhost:0"] * 4, "launch.device": "cuda"},
        {"launch.distributed_backend": "nccl", "launch.device": "cuda"},
        {"plan.partition": "parameters"},
        {"pipeline.schedule": "naive", "pipeline.stages_per_rank": 2, "plan.partition": "uniform"},
        {"optimizer.learning_rate_policy": "step", "optimizer.step_size_iterations": 5},
        {"optimizer.learning_rate_policy": "step", "optimizer.step_size_epochs": 5},
        {"data": {"type": "custom", "entry": "here.py:make", "options": {"rows": 3}}},
    ],
    ids=str,
)
def test_legal(changes: dict[str, Any]) -> None:
    if isinstance(changes.get("data"), dict):
        build_config({**RUN, **changes})
    else:
        build_config(with_changes(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train.batch_size": 10, "plan.partition": "auto"},
            "train.batch_size = 10 cannot be cut into pipeline.num_microbatches = 4 equal microbatches, and the "
            "planner counts with one size; use a batch size of 8 or 12, or 2 or 5 microbatches",
        ),
        (
            {"train.batch_size": 32, "pipeline.num_microbatches": 1_000_000_000},
            "train.batch_size = 32 cannot be cut into pipeline.num_microbatches = 1000000000 microbatches with "
            "samples; use a batch size of at least 1000000000, or at most 32 microbatches",
        ),
        (
            {"train.batch_size": 3},
            "train.batch_size = 3 cannot be cut into pipeline.num_microbatches = 4 microbatches with samples; use a "
            "batch size of at least 4, or at most 3 microbatches",
        ),
        (
            {"pipeline.schedule": "1f1bb"},
            f"pipeline.schedule = '1f1bb' is not one of {', '.join(map(repr, [*SCHEDULES, 'auto']))}; did you mean "
            "'1f1b'?",
        ),
        (
            {"pipeline.recompute_ratio": [0.3, 0]},
            "pipeline.recompute_ratio = [0.3, 0.0]: has 2 entries for 4 stages; give one ratio per stage, or one "
            "number for all",
        ),
        (
            {"pipeline.recompute": "always", "pipeline.recompute_ratio": 0.5},
            "pipeline.recompute = 'always' and pipeline.recompute_ratio = 0.5 say the same thing twice; keep one",
        ),
        (
            {"pipeline.recompute": "except_last"},
            "pipeline.recompute = 'except_last' needs pipeline.schedule = gpipe, not '1f1b'; elsewhere give the last "
            "stage, where each backward follows its forward, a recompute_ratio of 0",
        ),
        (
            {"plan.partition": [12, 13, 13, 12]},
            "plan.partition = [12, 13, 13, 12]: has 50 blocks in all, and the model has 49; take away 1",
        ),
        (
            {"plan.partition": [25, 24]},
            "plan.partition = [25, 24]: has 2 entries for 4 stages; give one block count per stage",
        ),
        (
            {"pipeline.num_ranks": 50, "plan.partition": "uniform"},
            "pipeline.num_ranks = 50 with 1 stage each makes 50 stages out of 49 blocks; use at most 49 stages",
        ),
        (
            {"pipeline.macrobatch": True},
            f"pipeline.macrobatch = true needs pipeline.schedule = {taking('microbatches_per_update')}, not '1f1b'",
        ),
        (
            {"pipeline.schedule": "pipedream", "pipeline.macrobatch": True, "pipeline.num_microbatches": 2},
            "pipeline.macrobatch = true needs at least as many microbatches as stages: pipeline.num_microbatches = 2, "
            "stages = 4",
        ),
        (
            {"pipeline.schedule": "pipedream", "pipeline.macrobatch": True, "pipeline.vertical_sync": True},
            "pipeline.macrobatch = true and pipeline.vertical_sync = true rule weight versions differently; keep one",
        ),
        (
            {"pipeline.vertical_sync": True},
            f"pipeline.vertical_sync = true needs pipeline.schedule = {taking('vertical_sync')}, not '1f1b'",
        ),
        (
            {"pipeline.schedule": "gpipe", "pipeline.stage_to_depth_map": [3, 2, 1, 0]},
            f"pipeline.stage_to_depth_map = [3, 2, 1, 0] needs pipeline.schedule = {taking('depths')}, not 'gpipe'",
        ),
        (
            {"pipeline.max_in_flight": 3},
            f"pipeline.max_in_flight = 3.0 needs pipeline.schedule = {taking('max_in_flight')}, not '1f1b'",
        ),
        (
            {"pipeline.rank_times": {"forward": [1, 1, 1, 2]}},
            "pipeline.rank_times = {'forward': [1.0, 1.0, 1.0, 2.0]} needs pipeline.schedule = searched, not '1f1b'",
        ),
        (
            {"pipeline.schedule": "searched", "pipeline.max_in_flight": 0.5},
            "pipeline: max_in_flight 0.5 is below one microbatch, which every rank has to hold from its forward to its "
            "backward whatever the order; the smallest limit that an order fits is 1",
        ),
        (
            {"pipeline.schedule": "searched", "pipeline.rank_times": {"weight_grad": [1, 2]}},
            "pipeline: weight_grad has 2 numbers for 4 ranks; give one per rank",
        ),
        (
            {"pipeline.stage_to_depth_map": [3, 2, 1]},
            "pipeline.stage_to_depth_map = [3, 2, 1] has 3 entries for 4 stages; give one per stage",
        ),
        (
            {"pipeline.stage_to_depth_map": [0, 1, 2, 3]},
            "pipeline.stage_to_depth_map = [0, 1, 2, 3]: stage 1 is deeper (1) than stage 0 (0) and would wait for "
            "ever; depths must not grow along the pipeline",
        ),
        (
            {"pipeline.stage_to_depth_map": {"0": 3, "2": 1}},
            "pipeline.stage_to_depth_map = {'0': 3, '2': 1} is not a list with one whole number of at least 0 per "
            "stage, or a mapping from every stage to one, or null",
        ),
        (
            {"model.tie_weights": True, "pipeline.schedule": "pipedream"},
            "model.tie_weights = true ties stage 0 to stage 3, and pipeline.schedule = 'pipedream' updates them "
            "apart; use a synchronous schedule such as 1f1b, or false",
        ),
        (
            {"launch.machines": ["localhost:0", "localhost:1"]},
            "launch.machines = ['localhost:0', 'localhost:1'] lists 2 for 4 ranks (pipeline.num_ranks); give one "
            "'host:device' per rank",
        ),
        (
            {"launch.machines": ["localhost:0", "localhost:1", "node7:0", "node7:1"]},
            "launch.machines: 'node7' is another machine; starting ranks over ssh is not supported yet; use "
            "'localhost:0', or start the ranks yourself with torchrun and leave launch.machines out",
        ),
        (
            {"launch.distributed_backend": "nccl", "launch.device": "cpu"},
            "launch.distributed_backend = 'nccl' needs GPUs and launch.device = 'cpu'; use 'gloo', or device 'cuda'",
        ),
        (
            {"launch.distributed_backend": "nccl", "launch.machines": ["localhost:0", "localhost:1"] * 2},
            "launch.distributed_backend = 'nccl' needs a GPU per rank and launch.machines gives 'localhost:0' to 2 "
            "ranks; use 'gloo', or other devices",
        ),
        (
            {"data.synthetic_data": False},
            "data.data_dir is missing; give the folder that `vpipe data prepare` wrote, or data.synthetic_data = true",
        ),
        (
            {"data.entry": "a:b"},
            "data.entry is for data.type = 'custom', and the type is 'bert'; change one of them",
        ),
        (
            {"data.type": "custom"},
            "data.entry is missing; data.type = 'custom' needs 'file.py:function' or 'package.module:function'",
        ),
        (
            {"data.type": "custom", "data.entry": "make"},
            "data.entry = 'make' is not of the form 'file.py:function' or 'package.module:function'",
        ),
        (
            {"model": {"type": "custom", "entry": "a:b", "hidden_size": 9}},
            "model.hidden_size = 9 means nothing to model.type = 'custom'; put it under model.options",
        ),
        (
            {"model.num_heads": 3},
            "model.num_heads = 3 does not divide model.hidden_size = 64; use 2 or 4",
        ),
        (
            {"model.size": "larg"},
            "model.size = 'larg' is not one of 'tiny', 'base', 'large', the sizes of model.type = 'bert'; did you mean "
            "'large'?",
        ),
        (
            {"model.size": "gpt2-xl"},
            "model.size = 'gpt2-xl' is not one of 'tiny', 'base', 'large', the sizes of model.type = 'bert'; for that "
            "set model.type = 'gpt'",
        ),
        (
            {"model.type": "gpt", "model.init_from": "weights", "plan.partition": "uniform"},
            "model.init_from starts a BERT from weights, and model.type = 'gpt'; leave it out",
        ),
        (
            {"model.num_kv_heads": 1},
            "model.num_kv_heads = 1 needs model.type = 'llama', and model.type = 'bert'; leave it out",
        ),
        (
            {"model.type": "llama", "model.num_kv_heads": 4, "plan.partition": "uniform"},
            "model.num_kv_heads = 4 does not divide model.num_heads = 2; use a divisor",
        ),
        (
            {"model.type": "llama", "model.dropout": 0.1, "plan.partition": "uniform"},
            "model.dropout = 0.1 is not for a llama, which has dropout in attention only; leave it out",
        ),
        (
            {"data.sequence_length": 600},
            "data.sequence_length = 600 is longer than model.max_position_embeddings = 512; raise the latter",
        ),
        (
            {"model.type": "llama", "model.hidden_size": 18, "model.num_heads": 6, "plan.partition": "uniform"},
            "model.hidden_size = 18 makes model.num_heads = 6 heads of 3, and a llama's rotary positions need an even "
            "number; change one",
        ),
        (
            {"train.epochs": 2},
            "train.epochs = 2 and train.iterations = 3 both say how long to train; keep one",
        ),
        (
            {"train.iterations": None},
            "train.epochs and train.iterations are both missing; give one of them",
        ),
        (
            {"optimizer.learning_rate_policy": "step"},
            "optimizer.step_size_iterations and optimizer.step_size_epochs are both missing; "
            "optimizer.learning_rate_policy = 'step' needs one of them",
        ),
        (
            {"optimizer.step_size_iterations": 5, "optimizer.step_size_epochs": 2},
            "optimizer.step_size_iterations = 5 and optimizer.step_size_epochs = 2 both say how far steps are apart; "
            "keep one",
        ),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_wording(changes: dict[str, Any], message: str) -> None:
    tree = {**RUN, **changes} if isinstance(changes.get("model"), dict) else with_changes(changes)
    if "hidden_size" in str(changes.get("model")):
        tree["model"]["intermediate_size"] = 3072  # the width would set it too, and be told of it as well
        tree["model"]["num_heads"] = 12
    with pytest.raises(ConfigError) as error:
        build_config(tree)
    assert str(error.value) == f"config: {message}"


def test_what_a_schedule_family_refuses_is_passed_on() -> None:
    with pytest.raises(
        ConfigError, match=r"^config: pipeline: schedule '1f1b' runs one stage per rank, got stages_per_rank=2"
    ):
        build_config(with_changes({"pipeline.stages_per_rank": 2, "plan.partition": "uniform"}))


@pytest.mark.parametrize(
    ("schedule", "stages_per_rank"), [("1f1b", 1), ("interleaved", 2), ("looped-bfs", 2), ("zb-v", 2), ("pipedream", 1)]
)
def test_a_rank_holds_as_many_stages_as_the_schedule_is_made_for(schedule, stages_per_rank):
    changes = {"pipeline.schedule": schedule, "pipeline.num_ranks": 2, "plan.partition": "uniform"}
    run = build_config(with_changes(changes))
    assert run.pipeline.stages_per_rank == stages_per_rank
    assert run.num_stages == 2 * stages_per_rank
