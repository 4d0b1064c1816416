"""What the kernels of this process make of a few operations: prints one JSON object.

Equal digests: the same bits. `rows` are the numbers of rows for which row 0 of a linear layer has the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_ROWS, WIDTH = 16, 48


def digest(*tensors: Tensor) -> str:
    """Return a short name for the bits of tensors."""
    content = b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:6]


def numbers(*shape: int) -> Tensor:
    """Return numbers that are the same for all kernels, as `torch.randn` is not."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.int64) * 7919 % 1009).reshape(shape).float() / 1009 - 0.5


def alike(call: Callable[[int], Tensor]) -> list[list[int]]:
    """Return the numbers of rows that give the same bits, together."""
    groups: dict[str, list[int]] = {}
    for count in range(1, NUM_ROWS + 1):
        groups.setdefault(digest(call(count)), []).append(count)
    return list(groups.values())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    value, weight = numbers(NUM_ROWS, WIDTH), numbers(WIDTH, WIDTH)
    image, kernel, query = numbers(2, 3, 16, 16), numbers(8, 3, 3, 3), numbers(2, 2, 16, 8)
    operations = {
        "linear": F.linear(value, weight),
        "attention": F.scaled_dot_product_attention(query, query, query),
        "gelu": F.gelu(value),
        "tanh": value.tanh(),
        "layer_norm": F.layer_norm(value, (WIDTH,)),
        "sum": value.sum(),
        "conv2d": F.conv2d(image, kernel),
        "randn": torch.randn(100),
        "rand": torch.rand(100),
        "dropout": F.dropout(torch.ones(100)),
    }
    report = {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "digests": {name: digest(result) for name, result in operations.items()},
        "rows": alike(lambda count: F.linear(value[:count], weight)[0]),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
