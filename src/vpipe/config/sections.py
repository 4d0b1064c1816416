"""The sections of a run. The text under each field is its reference: `vpipe config --fields` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, StrictBool, model_validator

from vpipe.config.fields import (
    Allowed,
    Count,
    Machine,
    Natural,
    NonNegative,
    PerStage,
    Port,
    Positive,
    Ratio,
    Share,
    Size,
)
from vpipe.config.model_sizes import MODEL_SIZES
from vpipe.schedule.registry import known_entry

__all__ = [
    "DataConfig",
    "LaunchConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "PlanConfig",
    "Section",
    "TrainConfig",
]

_SIZES = "for " + "; for ".join(f"{kind}: {', '.join(sizes)}" for kind, sizes in MODEL_SIZES.items())


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values never change, docstrings are the reference."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class ModelConfig(Section):
    """What is trained."""

    type: Literal["bert", "gpt", "llama", "custom"] = "bert"
    """`bert`: pre-training with masked words and next sentences; `gpt`, `llama`: predicting the next token, as GPT-2
    and Llama; `custom`: your own chain of blocks, see `entry`."""
    size: Annotated[str | None, Allowed(_SIZES)] = None
    """Published size that fills the numbers below where they are not given."""
    hidden_size: Count = 768
    """Width of a token's vector."""
    num_layers: Count = 12
    """Transformer layers as the paper counts them; BERT has `2 * num_layers + 1` blocks to cut between, the others one
    more: their output matrix is a block of its own."""
    num_heads: Count = 12
    """Attention heads per layer; must divide `hidden_size`. Default: one per 64 of `hidden_size`."""
    num_kv_heads: Count | None = None
    """For llama: heads of keys and values, which several heads share; must divide `num_heads`. null is `num_heads`."""
    intermediate_size: Count = 3072
    """Width inside the feed-forward block. Default: 4 times `hidden_size`."""
    vocab_size: Count | None = None
    """Tokens in the vocabulary; null takes it from the prepared data, and with synthetic data the published one:
    30522 for bert, 50257 for gpt, 32000 for llama."""
    max_position_embeddings: Count = 512
    """Longest sequence that the model has positions for, in tokens."""
    dropout: Share = 0.1
    """Dropout of embeddings, attention output and feed-forward output; llama has none, so 0 is its default."""
    attention_dropout: Share = 0.1
    """Dropout of attention weights; llama's default is 0."""
    tie_weights: bool = False
    """Use the word embedding as output matrix too: first and last stage share it, in synchronous schedules only."""
    init_from: Path | None = None
    """For bert: folder of a transformers BERT to start from, which also gives the numbers above that are not given;
    null starts from random weights."""
    entry: Annotated[str | None, Allowed("'file.py:function' or 'package.module:function'")] = None
    """For `custom`: the function that returns a `vpipe.Chain`, as 'file.py:function' or 'package.module:function'. What
    it draws from the global generators of torch, numpy and Python follows from `seed`, on every rank the same."""
    options: dict[str, JsonValue] = {}
    """For `custom`: keyword arguments of the entry function."""

    @model_validator(mode="before")
    @classmethod
    def _fill_sizes(cls, values: Any) -> Any:
        """Fill sizes that were not given from `size`, or in BERT's proportions from `hidden_size`."""
        if not isinstance(values, Mapping):
            return values
        kind, size, hidden = values.get("type", "bert"), values.get("size"), values.get("hidden_size")
        filled: dict[str, float] = {"dropout": 0.0, "attention_dropout": 0.0} if kind == "llama" else {}
        if isinstance(size, str) and isinstance(kind, str):
            filled |= MODEL_SIZES.get(kind, {}).get(size, {})
        if isinstance(hidden, int) and not isinstance(hidden, bool) and hidden > 0:
            filled["intermediate_size"] = 4 * hidden
            if hidden % 64 == 0 or hidden < 64:
                filled["num_heads"] = max(1, hidden // 64)
                filled.pop("num_kv_heads", None)
        return {**filled, **values}


class DataConfig(Section):
    """What it is trained on."""

    type: Literal["bert", "custom"] = "bert"
    """`bert`: what `vpipe data prepare bert` wrote, or synthetic; gpt and llama read it as text, without the masks.
    `custom`: your own source, see `entry`."""
    data_dir: Path | None = None
    """Folder that `vpipe data prepare` wrote."""
    synthetic_data: bool = False
    """Train on random tokens instead of `data_dir`: for measuring speed, the loss means nothing."""
    synthetic_samples: Count = 1024
    """Samples in one epoch of synthetic data."""
    sequence_length: Count | None = None
    """Tokens per sample; null takes it from the prepared data, and 128 with synthetic data."""
    masking: Literal["static", "dynamic"] = "static"
    """`static`: the masks chosen at preparation, the same every epoch; `dynamic`: new ones every epoch."""
    last_batch: Literal["train", "drop"] = "train"
    """What becomes of samples of an epoch that fill no batch: `train`: they are a last, smaller batch; `drop`: they are
    left out, and read in other epochs, which have another order."""
    entry: Annotated[str | None, Allowed("'file.py:function' or 'package.module:function'")] = None
    """For `custom`: the function that returns a `vpipe.BatchSource`, written and called as `model.entry` is, with the
    split, 'train' or 'eval'."""
    options: dict[str, JsonValue] = {}
    """For `custom`: keyword arguments of the entry function."""


class PipelineConfig(Section):
    """How microbatches flow."""

    schedule: str = "1f1b"
    """Name of the schedule, e.g. naive, gpipe, 1f1b, pipedream; `vpipe schedule --list` has them all. Or a CSV file
    with one order for these ranks and microbatches, as `vpipe schedule --format csv` prints it. `auto`: the planner
    chooses one of those that give the answer of one process."""
    num_ranks: Count | None = None
    """Ranks in the pipeline, one process each; null counts `launch.machines`, else the partition, else 1."""
    stages_per_rank: Count = 1
    """Stages that each rank holds; left out, as the schedule has it: 2 for those made for several, else 1."""
    num_microbatches: Annotated[Count | Literal["auto"], Allowed("a whole number of at least 1, or 'auto'")] = 1
    """Slices of a batch, of sizes that differ by one sample where `train.batch_size` is no multiple; the planner needs
    a multiple. Asynchronous schedules make an update after each. `auto`: the planner chooses."""
    recompute_ratio: Ratio | list[Ratio] = 0.0
    """Trailing share of a stage's blocks that keep no activations and compute them again; one for all, or a list."""
    recompute: Annotated[
        Literal["always", "except_last", "never"] | None,
        Allowed("one of 'always', 'except_last', 'never', true, false, null"),
    ] = None
    """Instead of ratios: `always` is 1 on every stage, `never` is 0, `except_last` is 1 for all but a batch's last
    microbatch (gpipe only). true keeps given ratios, and without any is `always`, with `plan.partition: auto` what the
    planner chooses; false is `never`, whatever they are."""
    stage_to_depth_map: PerStage | None = None
    """Warmup forwards of each stage, before a forward and a backward take turns; null is the least that keeps the
    pipeline full, `num_stages - 1 - stage`. More hides slow links at the price of memory. For 1f1b and pipedream."""
    macrobatch: bool = False
    """For pipedream: one update per batch instead of one per microbatch, with two weight versions (PipeDream-2BW)."""
    vertical_sync: bool = False
    """For pipedream: a microbatch uses, on every stage, the weight version that it met on stage 0."""
    max_in_flight: Annotated[
        Positive | list[Positive] | None, Allowed("a number above 0, or a list with one per rank, or null")
    ] = None
    """For searched: microbatches whose activations a rank may hold, one number or one per rank; of two stages on a
    rank, each counts a half. null is `num_ranks`, what 1f1b needs."""
    rank_times: dict[Literal["forward", "input_grad", "weight_grad"], list[NonNegative]] = {}
    """For searched: the time of each rank's share of one microbatch, in any unit, e.g. {forward: [1, 2], input_grad:
    [1, 2]}; what is left out takes 1 on every rank."""

    @model_validator(mode="before")
    @classmethod
    def _hold_stages_as_the_schedule_does(cls, given: object) -> object:
        if not isinstance(given, dict) or given.get("stages_per_rank") is not None:
            return given
        name = given.get("schedule")
        entry = known_entry(name) if isinstance(name, str) else None
        return given if entry is None else given | {"stages_per_rank": entry.default_stages_per_rank}


class PlanConfig(Section):
    """What is cut where."""

    partition: Annotated[
        list[Count] | str,
        Allowed("'auto', 'uniform', 'parameters', 'compute', a list with a whole number per stage, or a JSON file"),
    ] = "uniform"
    """Blocks per stage: a list, `uniform` (equal counts), `parameters` (fewest on the largest stage), `compute` (least
    measured time on the busiest stage), `auto` (measured, planned and simulated), or a JSON file {"partition": [...],
    "recompute_ratio": [...]}. One that `vpipe plan` wrote also sets the schedule, microbatches and all else that the
    plan needs; what the run gives another value itself counts, with a warning."""
    memory_limit: Annotated[
        Size | list[Size] | None, Allowed("a size such as 4GiB or a number of bytes, a list with one per rank, or null")
    ] = None
    """Bytes that a rank may hold. The planner keeps it by choosing what recomputes and what is swapped, and refuses a
    run that cannot; null is no limit."""
    policies: list[Literal["keep", "recompute", "swap"]] | None = None
    """What each block does with its activations, in model order; null is what `pipeline.recompute_ratio` says."""
    recompute_ahead: list[Natural] = []
    """Stages that recompute before the gradient arrives."""
    swap_versions: Annotated[StrictBool | list[Natural] | None, Allowed("true, false, null, or a list of stages")] = (
        None
    )
    """Of asynchronous schedules, whether weight versions that wait for their backwards are moved to host memory: on all
    stages that keep more than two, on none, or on those listed; null leaves it to the planner, if there is one."""
    swap_directory: Path | None = None
    """Where what is swapped goes on a CPU, a fast disk; null is where temporary files go."""
    predicted: dict[str, JsonValue] | None = None
    """What the plan file says that the run takes and holds, to be compared with what it does."""


class OptimizerConfig(Section):
    """How weights are updated."""

    name: Literal["adam", "adamw", "sgd", "lamb"] = "adamw"
    """The optimizer."""
    learning_rate: Positive = 1e-4
    """Peak learning rate, reached after the warmup."""
    learning_rate_policy: Literal["constant", "linear", "polynomial", "step", "cosine"] = "constant"
    """How the learning rate goes on after the warmup; all but `constant` and `step` end at `end_learning_rate`."""
    warmup_iterations: Natural = 0
    """Iterations over which the learning rate rises linearly from 0."""
    end_learning_rate: NonNegative = 0.0
    """Learning rate at the end of the run, for linear, polynomial and cosine."""
    polynomial_power: Positive = 1.0
    """Exponent of the polynomial policy; 1 is linear."""
    step_size_iterations: Count | None = None
    """For the step policy: iterations between two steps. Give this or `step_size_epochs`."""
    step_size_epochs: Count | None = None
    """For the step policy: epochs between two steps. A flat file that gives neither has the original's 30."""
    step_gamma: Positive = 0.1
    """For the step policy: what the learning rate is multiplied by at each step."""
    weight_decay: NonNegative = 0.0
    """Weight decay; biases and normalisation weights are left out."""
    momentum: Share = 0.9
    """Momentum of sgd."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay rates of the running mean and square, for adam, adamw and lamb."""
    eps: Positive = 1e-8
    """Added to the denominator, for adam, adamw and lamb."""
    clip_grad_norm: Positive | None = None
    """Largest gradient norm, over all stages (asynchronous schedules: over each stage); null does not clip."""


class TrainConfig(Section):
    """How long, and what is told on the way."""

    batch_size: Count = 32
    """Samples per batch over the whole pipeline; one iteration is one batch."""
    epochs: Count | None = None
    """Passes over the data. Give this or `iterations`."""
    iterations: Count | None = None
    """Batches to train on. Give this or `epochs`."""
    print_frequency: Count = 10
    """Iterations between two lines of progress."""
    verbose_frequency: Natural = 0
    """Iterations between two detailed reports of every rank; 0 gives none."""
    eval_frequency: Natural = 0
    """Iterations between two evaluations on held-out data; 0 evaluates only at the end."""
    eval_batch_size: Count | None = None
    """Samples per batch of an evaluation; null takes `batch_size`."""
    eval_batches: Natural | None = None
    """Batches per evaluation; null takes all held-out data, 0 never evaluates."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient norm does, which is not applied: end the run, or leave the update out."""
    gradient_norm: bool = False
    """Write the gradient norm to the metrics without clipping, too; ranks wait for each other to add it up."""
    save_model: bool = True
    """Write the trained weights to `model` in the run's folder; transformers' `from_pretrained` loads a BERT."""


class LaunchConfig(Section):
    """Where the ranks run."""

    machines: list[Machine] = []
    """One 'host:device' per rank, e.g. ['localhost:0', 'localhost:1']; empty puts all ranks on this machine."""
    distributed_backend: Literal["gloo", "nccl"] | None = None
    """What ranks talk through; null takes nccl when every rank has a GPU of its own, else gloo."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where the ranks compute; `auto` takes a GPU when there is one."""
    threads_per_rank: Count | None = None
    """CPU threads of each rank; null shares the machine's cores."""
    timeout_seconds: Positive = 300.0
    """How long a rank waits for another before it gives up."""
    master_port: Port | None = None
    """Port where ranks meet; null takes a free one."""
    shared_memory: bool = True
    """Ranks of one machine exchange messages in memory that both see (gloo); false sends them through sockets."""
    link_latency_ms: NonNegative = 0.0
    """Above 0, messages between ranks arrive so much later: what a slow network does, seen on one machine (gloo)."""
    link_bandwidth_mb_per_s: Positive | None = None
    """Likewise, each link carries one message at a time per direction and no more than this; null is no limit."""
