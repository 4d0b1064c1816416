"""Published models: the numbers that `model.size` stands for, by `model.type`."""

from __future__ import annotations

__all__ = ["BERT_SIZES", "MODEL_SIZES"]

BERT_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_layers": 2, "num_heads": 2, "intermediate_size": 512},
    "base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 4096},
}


def _gpt(hidden_size: int, num_layers: int, num_heads: int, max_position_embeddings: int) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "intermediate_size": 4 * hidden_size,
        "vocab_size": 50257,
        "max_position_embeddings": max_position_embeddings,
    }


def _llama(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    vocab_size: int,
    max_position_embeddings: int,
) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
    }


MODEL_SIZES: dict[str, dict[str, dict[str, int]]] = {
    "bert": BERT_SIZES,
    "gpt": {
        # Radford et al. 2019, table 2; Brown et al. 2020, table 2.1.
        "gpt2": _gpt(768, 12, 12, 1024),
        "gpt2-medium": _gpt(1024, 24, 16, 1024),
        "gpt2-large": _gpt(1280, 36, 20, 1024),
        "gpt2-xl": _gpt(1600, 48, 25, 1024),
        "gpt3-6.7b": _gpt(4096, 32, 32, 2048),
        "gpt3-175b": _gpt(12288, 96, 96, 2048),
    },
    "llama": {
        # Touvron et al. 2023 (both papers); Llama Team 2024, table 3.
        "llama-7b": _llama(4096, 32, 32, 32, 11008, 32000, 2048),
        "llama-13b": _llama(5120, 40, 40, 40, 13824, 32000, 2048),
        "llama-70b": _llama(8192, 80, 64, 8, 28672, 32000, 4096),
        "llama3-8b": _llama(4096, 32, 32, 8, 14336, 128256, 8192),
        "llama3-70b": _llama(8192, 80, 64, 8, 28672, 128256, 8192),
        "llama3-405b": _llama(16384, 126, 128, 8, 53248, 128256, 8192),
    },
}
