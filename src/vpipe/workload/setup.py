"""From a run's configuration to the things that train: data, model, pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import nn

from vpipe.config import RunConfig
from vpipe.config.entry import load_entry
from vpipe.config.planning.to_plan import to_plan
from vpipe.data.batches import evaluation_batches, iterate_batches, num_iterations, num_samples_read
from vpipe.data.bert.dataset import BertDataset, open_bert
from vpipe.data.bert.meta import Split
from vpipe.data.causal import CausalSource
from vpipe.data.custom import open_source
from vpipe.data.source import BatchSource
from vpipe.data.synthetic import SyntheticBertSource
from vpipe.errors import ConfigError, DataError, PlanError
from vpipe.model.chain import Chain
from vpipe.model.rng import seeding_user_code
from vpipe.model.zoo import build_chain
from vpipe.plan.plan import Plan
from vpipe.runtime.arguments import Memory
from vpipe.runtime.batch import Batch
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Hooks, Pipeline
from vpipe.runtime.weights.update import Update
from vpipe.workload.lr import learning_rate
from vpipe.workload.optim import build_optimizer

__all__ = ["Setup", "build_setup", "build_training_pipeline"]

_BERT_VOCAB_SIZE = 30522
_SEQUENCE_LENGTH = 128
_DECODERS = ("gpt", "llama")


@dataclass(frozen=True)
class Setup:
    """Model and data of a run, the same on every rank; nothing big is in memory yet."""

    config: RunConfig
    chain: Chain
    source: BatchSource
    held_out: BatchSource | None
    vocab_size: int | None
    iterations_per_epoch: int
    total_iterations: int

    def batches(self, fields: tuple[str, ...], start: int, count: int) -> Iterator[Batch]:
        """Yield `count` training batches from iteration `start` on, with `fields` only."""
        numbered = iterate_batches(
            seed=self.config.seed,
            num_samples=self.source.num_samples,
            batch_size=self.config.train.batch_size,
            start=start,
            drop_last=_drops_last(self.config),
        )
        for item in islice(numbered, count):
            yield Batch(self.source.batch(item.indices, fields, epoch=item.epoch), len(item.indices))

    def num_samples(self, iterations: int) -> int:
        """Count the samples of so many iterations from the first on."""
        size, drop_last = self.config.train.batch_size, _drops_last(self.config)
        return num_samples_read(iterations, self.source.num_samples, size, drop_last=drop_last)

    def batch_size(self, iteration: int) -> int:
        """Count the samples of one iteration, counted from 0: an epoch's last may have fewer."""
        return self.num_samples(iteration + 1) - self.num_samples(iteration)

    def evaluation_batches(self, fields: tuple[str, ...]) -> Iterator[Batch]:
        """Yield the held-out batches; the last one may be short."""
        if self.held_out is None:
            return
        size, most = self.config.eval_batch_size, self.config.train.eval_batches
        for indices in evaluation_batches(self.held_out.num_samples, size, most):
            yield Batch(self.held_out.batch(indices, fields), len(indices))

    def optimizer(self, named_parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Make the optimizer of one stage."""
        return build_optimizer(self.config.optimizer, named_parameters)

    def learning_rate(self, iteration: float) -> float:
        """Return the learning rate after `iteration` iterations."""
        return learning_rate(self.config.optimizer, iteration, self.total_iterations, self.iterations_per_epoch)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run, closed.

        Raises:
            PlanError: the partition does not fit the model or the number of stages.
        """
        return to_plan(self.config).resolve(self.chain, self.config)

    @property
    def evaluates(self) -> bool:
        """Say whether there is anything to evaluate on."""
        return self.held_out is not None


def build_setup(config: RunConfig) -> Setup:
    """Open the data and describe the model.

    Raises:
        DataError, ModelError, PlanError: they are missing, do not fit each other, or do not fit the plan.
    """
    source = _open(config, "train")
    if source is None:
        raise ConfigError("data: there is no training data; the entry function returned nothing for the split 'train'")
    held_out = _open(config, "eval") if _wants_evaluation(config, source) else None
    vocab_size = source.meta.vocab_size if isinstance(source, BertDataset) else _synthetic_vocab_size(config)
    _check_positions(config, source)
    chain = build_chain(config.model, seed=config.seed, data_vocab_size=vocab_size)
    source, held_out = _as_read(config, source), held_out and _as_read(config, held_out)
    if config.num_stages > len(chain):
        raise PlanError(
            f"{config.num_stages} stages are more than the model's {len(chain)} blocks; use at most {len(chain)} "
            "(pipeline.num_ranks times pipeline.stages_per_rank)"
        )
    for opened in (source, held_out):
        if opened is not None:
            _check_fields(chain, opened)
    microbatches = config.pipeline.num_microbatches
    per_epoch = num_iterations(
        source.num_samples,
        config.train.batch_size,
        1 if microbatches == "auto" else microbatches,
        drop_last=_drops_last(config),
    )
    total = config.train.iterations or per_epoch * (config.train.epochs or 1)
    return Setup(config, chain, source, held_out, vocab_size, per_epoch, total)


def _drops_last(config: RunConfig) -> bool:
    return config.data.last_batch == "drop"


def _wants_evaluation(config: RunConfig, source: BatchSource) -> bool:
    """Tell whether held-out data is needed; a set that was prepared without any is only a mistake if the run asks."""
    train = config.train
    if train.eval_batches is None and not train.eval_frequency and isinstance(source, BertDataset):
        return "eval" in source.meta.splits
    return train.eval_batches != 0


def _check_fields(chain: Chain, source: BatchSource) -> None:
    if missing := [name for name in chain.fields if name not in source.fields]:
        raise DataError(
            f"the model reads the batch fields {', '.join(chain.fields)}, but the data has no '{missing[0]}', only "
            f"{', '.join(source.fields)}; give the data that field, or rename it in the model's Chain(fields=...)"
        )


def _check_positions(config: RunConfig, source: BatchSource) -> None:
    """Check that a built-in model has positions for the samples; where no key does, a prepared set tells how long."""
    if config.model.type == "custom" or "input_ids" not in source.fields:
        return
    length, positions = math.prod(source.fields["input_ids"].shape_per_sample), config.model.max_position_embeddings
    if length > positions:
        raise ConfigError(
            f"model.max_position_embeddings is {positions}, and the data has sequences of {length} tokens; raise the "
            "former to that, or prepare shorter sequences"
        )


def _as_read(config: RunConfig, source: BatchSource) -> BatchSource:
    """Return the samples in the form that the model reads; a user's own source has it already."""
    return CausalSource(source) if config.model.type in _DECODERS and config.data.type == "bert" else source


def _synthetic_vocab_size(config: RunConfig) -> int | None:
    if config.model.type == "custom":
        return None
    return config.model.vocab_size or _BERT_VOCAB_SIZE


def _open(config: RunConfig, split: Split) -> BatchSource | None:
    data, model = config.data, config.model
    if data.type == "custom":
        return _open_custom(config, split)
    if data.synthetic_data:
        # Held-out samples are further ones, drawn from another seed.
        return SyntheticBertSource(
            data.synthetic_samples if split == "train" else max(1, data.synthetic_samples // 10),
            sequence_length=data.sequence_length or _SEQUENCE_LENGTH,
            vocab_size=model.vocab_size or _BERT_VOCAB_SIZE,
            seed=config.seed + (split == "eval"),
            dynamic=data.masking == "dynamic",
        )
    if data.data_dir is None:
        raise ConfigError(
            "data.data_dir is missing; run `vpipe data prepare bert --out DIR`, or set data.synthetic_data: true"
        )
    return open_bert(
        data.data_dir,
        split,
        masking=data.masking,
        seed=config.seed,
        sequence_length=data.sequence_length,
        vocab_size=model.vocab_size,
    )


def _open_custom(config: RunConfig, split: Split) -> BatchSource | None:
    """Open the user's own source under the run's seed, so that every rank gets the same data."""
    data = config.data
    if data.entry is None:
        raise ConfigError("data.type 'custom' needs data.entry: 'file.py:function' or 'package.module:function'")
    with seeding_user_code(config.seed, "import"):
        load_entry("data.entry", data.entry)
    with seeding_user_code(config.seed, "data.entry", split):
        return open_source(data.entry, split, options=data.options)


def build_training_pipeline(setup: Setup, world: World, hooks: Hooks) -> Pipeline:
    """Build this rank's part of the pipeline that the configuration describes; collective."""
    config = setup.config
    return Pipeline(
        setup.chain.with_field_specs(setup.source.fields),
        plan=setup.plan,
        optimizer=setup.optimizer,
        update=Update(
            config.optimizer.clip_grad_norm,
            setup.learning_rate,
            on_non_finite=config.train.on_non_finite,
            measure_norm=config.train.gradient_norm,
        ),
        memory=Memory(config.plan.memory_limit, swap_directory=config.plan.swap_directory),
        world=world,
        seed=config.seed,
        hooks=hooks,
    )
