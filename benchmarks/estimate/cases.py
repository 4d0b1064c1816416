"""Published runs, how each is said in our words, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

MPT_TABLE = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md"
SELECTIVE = "Korthikanti et al. 2022 (arXiv 2205.05198), table 5"
MEGATRON = "NVIDIA/Megatron-LM, README, 'GPT-3 Example'"
BERT_TABLE = "NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT, README (19.07)"


@dataclass(frozen=True)
class Case:
    """One run. `published` is the time of a step in seconds, of one pipeline."""

    name: str
    group: str
    source: str
    published: float
    model: dict[str, Any]
    sequence_length: int
    microbatch_size: int
    num_microbatches: int
    device: str
    dtype: str
    ranks: int = 1
    devices_per_rank: int = 1
    stages_per_rank: int = 1
    recompute: bool = False
    attention: Literal["flash", "plain"] = "flash"
    optimizer_bytes: int = 12
    link: str = "infiniband-hdr"
    is_fitted: bool = False
    """Whether the device's `matmul_fraction` was fitted to it; the others test what came of that."""


def _mpt(
    size: str, device: str, microbatch: int, count: int, tokens_per_s: int, *, sequence: int = 2048,
    recompute: bool = False,
) -> Case:  # fmt: skip
    """MPT (a GPT with 50,368 tokens) on 8 GPUs that share parameters and state (FSDP).

    In our words one GPU is a pipeline of one rank: it computes everything itself, for its share of the batch. What FSDP
    sends is taken to be hidden behind it. The optimizer's state is spread over 8 GPUs, so 12 / 8 bytes are updated.
    """
    hidden, layers, heads = {
        "760m": (1536, 24, 12), "1b": (2048, 24, 16), "3b": (2560, 32, 20), "7b": (4096, 32, 32),
        "13b": (5120, 40, 40), "30b": (7168, 48, 56),
    }[size]  # fmt: skip
    sizes = {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "intermediate_size": 4 * hidden}
    model = {"type": "gpt", **sizes, "vocab_size": 50368, "max_position_embeddings": sequence}
    tokens = microbatch * count * sequence
    return Case(
        f"MPT {size}, {sequence} tokens, {device}{', recomputed' if recompute else ''}", "one device", MPT_TABLE,
        tokens / tokens_per_s, model | {"dropout": 0.0, "attention_dropout": 0.0}, sequence, microbatch, count, device,
        "bf16", recompute=recompute, optimizer_bytes=2, is_fitted=size in ("1b", "7b") and not recompute,
    )  # fmt: skip


def _bert(device: str, dtype: str, sequence: int, batch: int, samples_per_s: float) -> Case:
    """BERT-large on one V100; updates are so rare (LAMB after hundreds of microbatches) that they do not count."""
    model = {"type": "bert", "size": "large", "vocab_size": 30528}
    return Case(
        f"BERT-large, {sequence} tokens, batch {batch}, {device} {dtype}", "one device", BERT_TABLE,
        512 * batch / samples_per_s, model, sequence, batch, 512, device, dtype, attention="plain",
        is_fitted=sequence == 128 and batch > 16,
    )  # fmt: skip


def _megatron(
    name: str, source: str, step_s: float, hidden: int, layers: int, heads: int, ranks: int, num_microbatches: int,
    *, microbatch: int = 1, stages: int = 1, recompute: bool,
) -> Case:  # fmt: skip
    """GPT with tensor parallelism in machines of 8 A100: a rank is one machine, whose devices split every block.

    "Selective" recomputation repeats what attention holds, and nothing else; in our words that is flash attention.
    """
    sizes = {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "intermediate_size": 4 * hidden}
    model = {"type": "gpt", **sizes, "vocab_size": 51200, "max_position_embeddings": 2048, "tie_weights": True}
    return Case(
        f"{name}, {'all recomputed' if recompute else 'selective'}", "pipeline x tensor", source, step_s, model, 2048,
        microbatch, num_microbatches, "a100-80gb", "fp16", ranks, 8, stages, recompute,
        "plain" if recompute else "flash", optimizer_bytes=12,
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    # Tokens per second and GPU: the table's column T/s/GPU.
    _mpt("760m", "a100-80gb", 24, 2, 32434),
    _mpt("1b", "a100-80gb", 14, 4, 20513),
    _mpt("3b", "a100-80gb", 10, 2, 10811),
    _mpt("3b", "a100-80gb", 3, 6, 7695, sequence=8192),
    _mpt("7b", "a100-80gb", 6, 2, 4641),
    _mpt("7b", "a100-80gb", 16, 2, 3684, sequence=4096, recompute=True),
    _mpt("13b", "a100-80gb", 2, 3, 2262),
    _mpt("30b", "a100-80gb", 3, 21, 916, recompute=True),
    _mpt("1b", "h100-80gb", 14, 1, 45455),
    _mpt("3b", "h100-80gb", 20, 6, 27046, sequence=1024),
    _mpt("7b", "h100-80gb", 6, 1, 10643),
    _mpt("13b", "h100-80gb", 2, 1, 4792),
    _mpt("30b", "h100-80gb", 3, 21, 2002, recompute=True),
    # Sequences per second of one GPU.
    _bert("v100-16gb", "fp16", 128, 16, 125.44),
    _bert("v100-32gb", "fp16", 128, 64, 171.52),
    _bert("v100-32gb", "fp16", 512, 8, 30.08),
    _bert("v100-32gb", "fp32", 128, 32, 40.32),
    _bert("v100-32gb", "fp32", 512, 4, 8.36),
    # Seconds per iteration.
    _megatron("22B, 1 x 8", SELECTIVE, 1.42, 6144, 48, 64, 1, 1, microbatch=4, recompute=True),
    _megatron("22B, 1 x 8", SELECTIVE, 1.10, 6144, 48, 64, 1, 1, microbatch=4, recompute=False),
    _megatron("175B, 8 x 8", SELECTIVE, 18.13, 12288, 96, 96, 8, 64, stages=3, recompute=True),
    _megatron("175B, 8 x 8", SELECTIVE, 13.75, 12288, 96, 96, 8, 64, stages=3, recompute=False),
    _megatron("530B, 35 x 8", SELECTIVE, 49.05, 20480, 105, 128, 35, 280, stages=3, recompute=True),
    _megatron("530B, 35 x 8", SELECTIVE, 37.83, 20480, 105, 128, 35, 280, stages=3, recompute=False),
    _megatron("1T, 64 x 8", SELECTIVE, 94.42, 25600, 128, 160, 64, 512, recompute=True),
    _megatron("1T, 64 x 8", SELECTIVE, 71.49, 25600, 128, 160, 64, 512, recompute=False),
    # 8 replicas of 16 x 8 devices share a batch of 1,536.
    _megatron("175B, 16 x 8 (of 8 replicas)", MEGATRON, 32.0, 12288, 96, 96, 16, 192, recompute=True),
)

MEMORY = {
    # GiB per device without recomputation of whole layers: figure 1 of the same paper.
    "22B, 1 x 8, selective": (45.5625, 9.5625),
    "175B, 8 x 8, selective": (45.5625, 12.3515625),
    "530B, 35 x 8, selective": (31.640625, 23.076171875),
    "1T, 64 x 8, selective": (32.958984375, 26.5625),
}
