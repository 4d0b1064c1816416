"""Models to estimate: published ones by name, and that of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpipe.config import RunConfig
from vpipe.config.sections import ModelConfig
from vpipe.errors import PlanError
from vpipe.measure.count.count import Assumptions, count_blocks, count_kinds, num_tied
from vpipe.model.chain import Chain
from vpipe.model.zoo import build_chain
from vpipe.planner.estimate.analytic import ModelWork
from vpipe.words.near import did_you_mean
from vpipe.workload.setup import build_setup

__all__ = ["DTYPES", "PUBLISHED", "Published", "count_model", "count_published", "count_run", "find_published"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""torch's types, by the names of `Precision.activation_type`."""


@dataclass(frozen=True)
class Published:
    """A model that is known by a name, and how it was trained."""

    name: str
    model: ModelConfig
    sequence_length: int
    batch_size: int
    """Samples per update; the nearest round number."""


def _published(kind: str, size: str, sequence_length: int, batch_size: int) -> Published:
    name = f"{kind}-{size}" if kind == "bert" else size
    model = ModelConfig.model_validate({"type": kind, "size": size, "tie_weights": kind != "llama"})
    return Published(name, model, sequence_length, batch_size)


_TRAINED = {
    # Tokens per sample and samples per update: Devlin et al. 2019; Radford et al. 2019; Brown et al. 2020, whose 3.2
    # million tokens are 1,536 samples of 2,048 in Narayanan et al. 2021; Touvron et al. 2023, 4 million tokens.
    "bert": {"base": (512, 256), "large": (512, 256)},
    "gpt": {
        **dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), (1024, 512)),
        "gpt3-6.7b": (2048, 1024),
        "gpt3-175b": (2048, 1536),
    },
    "llama": {
        "llama-7b": (2048, 2048),
        "llama-13b": (2048, 2048),
        "llama-70b": (4096, 1024),
        "llama3-8b": (8192, 512),
        "llama3-70b": (8192, 512),
        "llama3-405b": (8192, 512),
    },
}

PUBLISHED: dict[str, Published] = {
    item.name: item
    for kind, sizes in _TRAINED.items()
    for item in (_published(kind, size, *trained) for size, trained in sizes.items())
}


def find_published(name: str) -> Published:
    """Return a published model.

    Raises:
        PlanError: there is none of that name; the text lists those there are.
    """
    if name not in PUBLISHED:
        hint = did_you_mean(name, PUBLISHED)
        raise PlanError(
            f"unknown model '{name}'{hint}; known are {', '.join(PUBLISHED)}, or give the YAML file of a run"
        )
    return PUBLISHED[name]


def count_published(model: Published, sizes: Sequence[int], assumptions: Assumptions) -> ModelWork:
    """Count a published model for microbatches of some sizes.

    Raises:
        ModelError: it has no positions for samples of that many tokens.
    """
    chain = build_chain(model.model)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(chain.fields, (model.sequence_length,))
    if "next_sentence_label" in shapes:
        shapes["next_sentence_label"] = ()

    def fields(size: int) -> dict[str, Tensor]:
        return {name: torch.empty((size, *shape), dtype=torch.int64, device="meta") for name, shape in shapes.items()}

    return count_model(model.name, chain, fields, sizes, assumptions)


def count_run(config: RunConfig, sizes: Sequence[int], assumptions: Assumptions) -> ModelWork:
    """Count the model of a run, on samples like those of its data.

    Raises:
        ConfigError, DataError, ModelError: the run cannot be set up, or a block cannot run on the meta device.
    """
    setup = build_setup(config)

    def fields(size: int) -> dict[str, Tensor]:
        return {
            name: torch.empty(spec.shape(size), dtype=spec.dtype, device="meta")
            for name, spec in setup.source.fields.items()
        }

    return count_model(config.model.size or config.model.type, setup.chain, fields, sizes, assumptions)


def count_model(
    name: str,
    chain: Chain,
    fields: Callable[[int], Mapping[str, Tensor]],
    sizes: Sequence[int],
    assumptions: Assumptions,
) -> ModelWork:
    """Count a chain for microbatches of some sizes; `fields` gives the batch fields of such a microbatch.

    Raises:
        ModelError: a block cannot run on the meta device.
    """
    works = {size: count_blocks(chain, fields(size), assumptions) for size in sorted(set(sizes))}
    first = next(iter(works.values()))
    shared = sum(num_tied(chain, group) * (len(group) - 1) for group in chain.tied)
    tokens = fields(1).get("input_ids")
    return ModelWork(
        name=name,
        num_parameters=sum(work.num_parameters for work in first) - shared,
        tokens_per_sample=0 if tokens is None else tokens.shape[1],
        sizes=works,
        num_kinds=count_kinds(chain, first),
        attention=assumptions.attention,
        masked_share=assumptions.target_share if "mlm" in chain.loss.parts else None,
    )
