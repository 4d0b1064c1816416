"""From a file to a run: YAML, overrides, paths, files beside it, and back."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpipe.config import RunConfig, build_config, dump_config, load_config, read_config
from vpipe.config.original.flat import FLAT_KEYS
from vpipe.config.planning.to_plan import to_plan
from vpipe.config.problems import native_keys, sections
from vpipe.config.renamed import with_first_names
from vpipe.config.sections import ModelConfig
from vpipe.config.text import parse_yaml
from vpipe.config.tree import set_key
from vpipe.errors import ConfigError
from vpipe.plan.recipe import RankTimes, Recipe
from vpipe.schedule.registry import SCHEDULES, build_schedule

RUNNABLE: dict[str, Any] = {"data": {"synthetic_data": True}, "train": {"iterations": 3}}


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    path = folder / "run.yml"
    path.write_text(text)
    return load_config(path, overrides)


def error_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(folder, text, *overrides)
    return str(error.value).removeprefix(str(folder / "run.yml")).removeprefix(": ")


SMALL = "data: {synthetic_data: true}\ntrain: {iterations: 3, batch_size: 8}\n"


def test_native_file(tmp_path: Path) -> None:
    run = load(tmp_path, SMALL + "pipeline: {num_ranks: 2, num_microbatches: 4}\nseed: 7\nlaunch:\n")
    assert (run.seed, run.num_ranks, run.num_stages, run.microbatch_size) == (7, 2, 2, 2)
    assert run.model.vocab_size == 30522
    assert run.data.sequence_length == 128
    assert run.num_blocks == 25


def test_runs_never_change() -> None:
    run = build_config(RUNNABLE)
    with pytest.raises(ValueError, match="frozen"):
        run.train.batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E3", 1000.0), ("1.5e+2", 150.0), ("-.5", -0.5), (".inf", float("inf")), ("3", 3),
        ("1f1b", "1f1b"), ("2020-01-01", "2020-01-01"), ("e3", "e3"), ("1e", "1e"), ("'1e-3'", "1e-3"),
    ],
)  # fmt: skip
def test_yaml_numbers(text: str, value: object) -> None:
    parsed = parse_yaml(text, "text")
    assert parsed == value
    assert type(parsed) is type(value)


def test_number_in_scientific_notation_reaches_the_run(tmp_path: Path) -> None:
    run = load(tmp_path, SMALL + "optimizer: {learning_rate: 1e-3, eps: '1e-6'}\n", "train.batch_size=1e1")
    assert (run.optimizer.learning_rate, run.optimizer.eps, run.train.batch_size) == (0.001, 1e-6, 10)


def test_sizes_follow_the_preset_and_the_width() -> None:
    large = build_config({**RUNNABLE, "model": {"size": "large"}}).model
    assert (large.hidden_size, large.num_layers, large.num_heads, large.intermediate_size) == (1024, 24, 16, 4096)
    narrow = build_config({**RUNNABLE, "model": {"size": "large", "hidden_size": 128}}).model
    assert (narrow.hidden_size, narrow.num_layers, narrow.num_heads, narrow.intermediate_size) == (128, 24, 2, 512)


def test_a_size_fills_what_its_family_has() -> None:
    def model(**changes: Any) -> ModelConfig:
        return build_config({**RUNNABLE, "model": changes}).model

    gpt = model(type="gpt", size="gpt3-175b")
    assert (gpt.num_layers, gpt.hidden_size, gpt.num_heads, gpt.vocab_size) == (96, 12288, 96, 50257)
    assert (gpt.max_position_embeddings, gpt.dropout) == (2048, 0.1)
    llama = model(type="llama", size="llama-70b")
    assert (llama.num_kv_heads, llama.intermediate_size, llama.dropout, llama.attention_dropout) == (8, 28672, 0, 0)
    assert model(type="llama", size="llama-70b", hidden_size=128).num_kv_heads is None
    assert model(type="llama", num_layers=2, vocab_size=99).vocab_size == 99


@pytest.mark.parametrize(("kind", "blocks", "vocabulary"), [("bert", 5, 30522), ("gpt", 6, 50257), ("llama", 6, 32000)])
def test_blocks_and_synthetic_vocabulary_of_each_family(kind: str, blocks: int, vocabulary: int) -> None:
    run = build_config({**RUNNABLE, "model": {"type": kind, "num_layers": 2}})
    assert (run.num_blocks, run.model.vocab_size) == (blocks, vocabulary)


def test_relative_paths_start_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cuts").mkdir()
    (tmp_path / "cuts" / "two.json").write_text('{"partition": [2, 3]}')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = (
        "model: {size: tiny}\ndata: {data_dir: ../data}\nplan: {partition: cuts/two.json}\ntrain: {epochs: 1}\n"
        "log_directory: logs\npipeline: {num_microbatches: 2}"
    )
    run = load(tmp_path, text)
    assert run.data.data_dir == tmp_path.parent / "data"
    assert run.log_directory == tmp_path / "logs"
    assert run.plan.partition == [2, 3]
    assert run.num_ranks == 2
    assert load(tmp_path, text, "data.data_dir=near").data.data_dir == tmp_path / "near"
    assert load(tmp_path, SMALL).log_directory == tmp_path / "runs"


def test_entries_start_from_the_file_when_they_name_one(tmp_path: Path) -> None:
    text = SMALL + "model: {type: custom, entry: 'net.py:make'}\n"
    assert load(tmp_path, text).model.entry == f"{tmp_path}/net.py:make"
    assert load(tmp_path, text, "model.entry=my.net:make").model.entry == "my.net:make"


def test_initial_model_gives_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 99}))
    run = load(tmp_path, SMALL + "model: {init_from: ., num_heads: 4}\n")
    assert (run.model.hidden_size, run.model.num_layers, run.model.vocab_size, run.model.num_heads) == (32, 3, 99, 4)
    assert run.num_blocks == 7
    assert error_of(tmp_path, SMALL + "model: {init_from: none}\n") == (
        f"model.init_from = {tmp_path}/none/config.json: no such file"
    )


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.batch_size=16", ("train", "batch_size"), 16),
        ("batch_size=16", ("train", "batch_size"), 16),
        ("optimizer.learning_rate=1e-2", ("optimizer", "learning_rate"), 0.01),
        ("pipeline.recompute_ratio=0.5", ("pipeline", "recompute_ratio"), 0.5),
        ("optimizer.betas=[0.8, 0.9]", ("optimizer", "betas"), (0.8, 0.9)),
        ("sync_mode=asp", ("pipeline", "schedule"), "pipedream"),
        ("machines=[localhost:0]", ("launch", "machines"), ["localhost:0"]),
        ("launch.distributed_backend=null", ("launch", "distributed_backend"), None),
        ("data={synthetic_data: true, masking: dynamic}", ("data", "masking"), "dynamic"),
    ],
)
def test_overrides(tmp_path: Path, override: str, key: tuple[str, str], value: object) -> None:
    text = SMALL + "pipeline: {schedule: gpipe, num_microbatches: 8}\nlaunch: {distributed_backend: gloo}\n"
    run = load(tmp_path, text, override)
    assert getattr(getattr(run, key[0]), key[1]) == value


def test_last_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL, "seed=1", "seed=2").seed == 2


def test_options_of_a_custom_model_by_override(tmp_path: Path) -> None:
    run = load(tmp_path, SMALL + "model: {type: custom, entry: 'a:b'}\n", "model.options.width=3")
    assert run.model.options == {"width": 3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size", "--set train.batch_size: is not of the form key=value, e.g. train.batch_size=8"),
        ("=3", "--set =3: is not of the form key=value, e.g. train.batch_size=8"),
        ("train..x=3", "--set train..x=3: is not of the form key=value, e.g. train.batch_size=8"),
        ("plan.partition=[1,", "--set plan.partition=[1,, line 1, column 4: expected the node content, but found "
         "'<stream end>'"),
        ("train.batchsize=3", "train.batchsize = 3 is not a known key; did you mean 'batch_size'?"),
        ("batchsize=3", "batchsize = 3 is not a known key; did you mean 'batch_size'?"),
        ("modle={size: tiny}", "modle = {'size': 'tiny'} is not a known key; did you mean 'model'?"),
        ("hidden_size=3", "hidden_size = 3 is not a known key; did you mean 'model.hidden_size'?"),
        ("pipeline=&a [*a]", "--set pipeline=&a [*a]: is nested too deeply, or an alias stands inside what it repeats"),
        ("batch_size=no", "batch_size = false is not a whole number of at least 1"),
    ],
)  # fmt: skip
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    assert error_of(tmp_path, SMALL, override) == message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yml: no such file$"):
        load_config(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_text_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"run\.yml: is not UTF-8 text \(byte 3\)"):
        load_config(path)
    assert error_of(tmp_path, "train:\n  batch_size: 3\n   epochs: 2\n") == (
        ", line 3, column 10: mapping values are not allowed here"
    )
    assert error_of(tmp_path, "train: {epochs: 1}\ntrain: {epochs: 2}\n") == (
        ", line 2, column 1: the key 'train' is given twice"
    )
    assert error_of(tmp_path, "- 1\n") == "is not a mapping of keys to values, but [1]"
    assert error_of(tmp_path, "a: \x07").startswith("unacceptable character")
    assert error_of(tmp_path, "? [1, 2]\n: 3\n") == ", line 1, column 3: a key must be a single word"
    assert error_of(tmp_path, "{[1]: 3}") == ", line 1, column 2: a key must be a single word"
    assert error_of(tmp_path, "---\na: 1\n---\nb: 2\n") == (
        ", line 3, column 1: expected a single document in the stream but found another document"
    )


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "a: &a {b: {c: *a}}", "[" * 5000 + "]" * 5000], ids=lambda text: text[:9]
)
def test_yaml_without_a_bottom(tmp_path: Path, text: str) -> None:
    assert error_of(tmp_path, text) == "is nested too deeply, or an alias stands inside what it repeats"


def test_aliases_and_merges_are_read(tmp_path: Path) -> None:
    text = "data: {synthetic_data: true}\ntrain: {<<: {iterations: 3}, batch_size: &b 8, eval_batch_size: *b}\n"
    train = load(tmp_path, text).train
    assert (train.iterations, train.batch_size, train.eval_batch_size) == (3, 8, 8)


def test_empty_file_says_what_is_needed(tmp_path: Path) -> None:
    assert error_of(tmp_path, "").splitlines() == [
        "2 errors",
        "  data.data_dir is missing; give the folder that `vpipe data prepare` wrote, or data.synthetic_data = true",
        "  train.epochs and train.iterations are both missing; give one of them",
    ]


def test_every_error_at_once(tmp_path: Path) -> None:
    text = """
model: 5
seed: -1
pipline: {schedule: gpipe}
data: {synthetic_data: 'maybe', masking: dynamik}
pipeline: {recompute_ratio: [0.1, 2], num_microbatches: 9, schedule: gpip}
plan: {partition: [12, 0]}
optimizer: {name: adm, learning_rate: fast, betas: [1]}
train: {batch_sise: 8, batch_size: 8, epochs: true}
launch: {machines: [a], timeout_seconds: .inf}
"""
    lines = error_of(tmp_path, text).splitlines()
    assert lines[0] == f"{len(lines) - 1} errors"
    assert sorted(lines[1:]) == sorted(
        [
            "  model = 5 is not a section; write its keys below it, e.g. model.type",
            "  seed = -1 is not a whole number of at least 0",
            "  pipline = {'schedule': 'gpipe'} is not a known key; did you mean 'pipeline'?",
            "  data.synthetic_data = 'maybe' is not true or false",
            "  data.masking = 'dynamik' is not one of 'static', 'dynamic'; did you mean 'dynamic'?",
            "  pipeline.recompute_ratio = [0.1, 2] is not a number from 0 to 1, or a list (each entry: a number from "
            "0 to 1)",
            "  plan.partition = [12, 0] is not 'auto', 'uniform', 'parameters', 'compute', a list with a whole number "
            "per stage, or a JSON file",
            "  optimizer.name = 'adm' is not one of 'adam', 'adamw', 'sgd', 'lamb'; did you mean 'adam'?",
            "  optimizer.learning_rate = 'fast' is not a number above 0",
            "  optimizer.betas = [1] is not a list of 2 (each entry: a number from 0 to below 1)",
            "  train.batch_sise = 8 is not a known key; did you mean 'batch_size'?",
            "  train.epochs = true is not a whole number of at least 1, or null",
            "  launch.machines = ['a'] is not a list (each entry: 'host:device', e.g. 'localhost:0')",
            "  launch.timeout_seconds = inf is not a number above 0",
            f"  pipeline.schedule = 'gpip' is not one of {', '.join(map(repr, [*SCHEDULES, 'auto']))}; did you mean "
            "'gpipe'?",
            "  train.batch_size = 8 cannot be cut into pipeline.num_microbatches = 9 microbatches with samples; use a "
            "batch size of at least 9, or at most 8 microbatches",
        ]
    )  # fmt: skip


def test_unknown_key_without_a_like_one_lists_those_of_its_section(tmp_path: Path) -> None:
    assert error_of(tmp_path, SMALL + "plan: {3: 4}\n") == (
        "plan.3 = 4 is not a known key; known here: partition, memory_limit, policies, recompute_ahead, swap_versions, "
        "swap_directory, predicted"
    )
    assert error_of(tmp_path, SMALL + "zzz: 1\n").startswith(
        "zzz = 1 is not a known key; known here: seed, log_directory, "
    )


def test_no_error_about_what_a_broken_key_leaves_open(tmp_path: Path) -> None:
    # The partition would decide the number of ranks: nothing follows from the default that stands in for it.
    text = SMALL + "plan: {partition: [a]}\npipeline: {recompute_ratio: [0, 0, 0, 0]}\n"
    assert error_of(tmp_path, text).startswith("plan.partition = ['a'] is not ")


def test_warnings_are_logged_and_returned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = SMALL + "pipeline: {num_ranks: 3}\n"
    with caplog.at_level(logging.WARNING, "vpipe.config"):
        run = load(tmp_path, text)
    warning = (
        "pipeline.num_microbatches is not given, so it is 1: each of 3 ranks waits for 67% of the time (stages of "
        "equal time); num_microbatches = 8, which batch_size 8 allows, makes it 20%"
    )
    assert caplog.messages == [f"{tmp_path}/run.yml: {warning}"]
    assert read_config(tmp_path / "run.yml") == (run, (warning,))


@pytest.mark.parametrize(
    ("recompute", "ratio", "mode", "ratios"),
    [
        ("true", "", "always", [1.0, 1.0]),
        ("true", "recompute_ratio: [0.5, 0]", None, [0.5, 0.0]),
        ("true", "recompute_ratio: 0.25", None, [0.25, 0.25]),
        ("true", "recompute_ratio: [0, 0]", None, [0.0, 0.0]),
        ("false", "recompute_ratio: [0.5, 0]", "never", [0.0, 0.0]),
        ("false", "", "never", [0.0, 0.0]),
        ("always", "", "always", [1.0, 1.0]),
        ("null", "recompute_ratio: 0.5", None, [0.5, 0.5]),
    ],
)
def test_recompute(tmp_path: Path, recompute: str, ratio: str, mode: str | None, ratios: list[float]) -> None:
    text = SMALL + f"pipeline:\n  num_ranks: 2\n  num_microbatches: 2\n  recompute: {recompute}\n  {ratio}\n"
    run = load(tmp_path, text)
    assert run.pipeline.recompute == mode
    assert run.recompute_ratios == ratios


def test_a_run_may_overrule_the_ratios_of_its_partition_file(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"partition": [2, 3], "recompute_ratio": [0.5, 0]}')
    text = SMALL + "model: {size: tiny}\npipeline: {num_microbatches: 2}\nplan: {partition: cut.json}\n"
    assert load(tmp_path, text).recompute_ratios == [0.5, 0.0]
    assert load(tmp_path, text, "pipeline.recompute_ratio=0.1").recompute_ratios == [0.1, 0.1]
    assert load(tmp_path, text, "recompute=false").recompute_ratios == [0.0, 0.0]
    assert load(tmp_path, text, "recompute=always").recompute_ratios == [1.0, 1.0]


def test_a_run_says_its_plan() -> None:
    pipeline = {"schedule": "pipedream", "num_ranks": 2, "num_microbatches": 4, "macrobatch": True}
    run = build_config({**RUNNABLE, "pipeline": {**pipeline, "stage_to_depth_map": {"0": 3, "1": 1}}})
    assert to_plan(run).recipe == Recipe("pipedream", 4, 2, 1, depths=(3, 1), macrobatch=True)
    assert (
        to_plan(run).sample.orders
        == build_schedule("pipedream", 2, 16, depths=[3, 1], microbatches_per_update=4).orders
    )
    assert to_plan(build_config(RUNNABLE)).options == {}
    searched = {"schedule": "searched", "num_ranks": 2, "num_microbatches": 4}
    given = {"max_in_flight": 1.5, "rank_times": {"forward": [1, 2]}}
    run = build_config({**RUNNABLE, "pipeline": {**searched, **given}})
    assert to_plan(run).options == {"max_in_flight": 1.5, "rank_times": RankTimes(forward=(1.0, 2.0))}
    assert (
        to_plan(run).build().orders
        == build_schedule("searched", 2, 4, stages_per_rank=1, max_in_flight=1.5, forward=[1.0, 2.0]).orders
    )
    assert to_plan(build_config({**RUNNABLE, "pipeline": searched})).options == {}


def test_an_old_name_works_with_a_warning(tmp_path: Path) -> None:
    text = SMALL + "pipeline: {schedule: searched, num_ranks: 2, num_microbatches: 8, memory_limit_microbatches: 1.5}\n"
    (tmp_path / "run.yml").write_text(text)
    run, warnings = read_config(tmp_path / "run.yml")
    assert run.pipeline.max_in_flight == 1.5
    assert warnings == (
        "pipeline.memory_limit_microbatches is called pipeline.max_in_flight now; rename it (memory limits are "
        "bytes, plan.memory_limit)",
    )
    (tmp_path / "run.yml").write_text(text.replace("1.5", "null"))
    assert read_config(tmp_path / "run.yml").warnings == ()
    (tmp_path / "run.yml").write_text(text.replace("1.5", "1.5, max_in_flight: 2"))
    with pytest.raises(ConfigError, match=r"are the same setting, given twice; keep pipeline\.max_in_flight"):
        read_config(tmp_path / "run.yml")
    (tmp_path / "run.yml").write_text(text.replace("memory_limit_microbatches", "max_in_flight"))
    for override in (
        "pipeline.memory_limit_microbatches=2",
        f"pipeline={text.partition('pipeline: ')[2]}".replace("1.5", "2"),
    ):
        run, warnings = read_config(tmp_path / "run.yml", [override])
        assert run.pipeline.max_in_flight == 2
        assert len(warnings) == 1
    assert "memory_limit_microbatches: 2.0" in with_first_names(dump_config(run))


texts = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12)
folders = texts.map(lambda name: "d" + name.replace("/", "").replace(".", ""))
per_stage = st.lists(st.integers(1, 99), min_size=3, max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
positive = st.floats(1e-12, 1e6)
runs = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "model": st.just({"type": "custom", "entry": "a.b:c"}).flatmap(
            lambda model: st.builds(lambda options: {**model, "options": options}, st.dictionaries(texts, json_values))
        ),
        "data": st.fixed_dictionaries(
            {"data_dir": folders, "masking": st.just("dynamic")}
        ),
        "pipeline": st.fixed_dictionaries(
            {
                "schedule": st.sampled_from(["gpipe", "1f1b", "naive"]),
                "num_ranks": st.just(3),
                "recompute_ratio": st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=3, max_size=3),
            }
        ),
        "plan": st.fixed_dictionaries(
            {"partition": st.sampled_from(["uniform", "parameters"]) | per_stage}
        ),
        "optimizer": st.fixed_dictionaries(
            {"learning_rate": positive, "eps": positive, "betas": st.tuples(st.floats(0, 0.9), st.floats(0, 0.9))}
        ),
        "train": st.fixed_dictionaries({"epochs": st.integers(1, 9), "eval_batch_size": st.none() | st.integers(1, 9)}),
    }
)  # fmt: skip


@given(runs)
def test_dump_loads_to_an_equal_run(tree: dict[str, Any]) -> None:
    run = build_config(tree)
    text = dump_config(run)
    assert build_config(parse_yaml(text, "dump"), folder="/elsewhere") == run
    assert build_config(json.loads(json.dumps(run.model_dump(mode="json"))), folder="/elsewhere") == run


def test_dump_is_readable() -> None:
    run = build_config({**RUNNABLE, "plan": {"partition": [12, 13]}, "pipeline": {"num_microbatches": 2}})
    lines = dump_config(run).splitlines()
    assert "plan:" in lines
    assert "  partition: [12, 13]" in lines
    assert "  betas: [0.9, 0.999]" in lines


KEYS = st.sampled_from([*native_keys(), *native_keys(), *sections(), *FLAT_KEYS]) | texts
NESTED = json_values | st.sampled_from(
    ["bert", "custom", "a.py:b", "gpipe", "pipedream", "asp", True, 1, 0.5, [1, 2], 1e300]
)


@given(st.dictionaries(KEYS, NESTED, max_size=6))
def test_whatever_is_written_gives_a_run_or_a_config_error(content: dict[str, Any]) -> None:
    tree = copy.deepcopy(RUNNABLE)
    for key, value in content.items():
        set_key(tree, key if key in native_keys() else key.replace(".", ""), value)
    try:
        run = build_config(tree)
    except ConfigError:
        return
    assert build_config(parse_yaml(dump_config(run), "dump")) == run
