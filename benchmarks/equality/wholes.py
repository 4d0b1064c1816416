"""Users' models that are no plain row of modules: blocks read and write several values, the forward is their own."""

from __future__ import annotations

import torch
from benchmarks.equality.layers import WIDTH, Attention, Ema, Mlp
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Aliases", "Masked", "Skips", "Translator", "Wires"]

Wires = tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]


class _Begin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, prefix: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.left(prefix)), self.right(memory.mean(1, keepdim=True))


class _Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.layer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), Mlp()

    def forward(self, hidden: Tensor, memory: Tensor, gate: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.query(hidden) @ self.key(memory).transpose(1, 2) + mask
        mixed = functional.dropout(scores.softmax(-1), 0.1, self.training) @ memory
        return self.layer(hidden + mixed * torch.sigmoid(gate)), gate * 0.9


class _Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor, source: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.cat((hidden, source), -1)))


class Translator(nn.Module):
    """An encoder and a decoder, a mask for all samples, and a field that the first and the last block read."""

    wires: Wires = (
        ("first", ("source",), ("memory",)),
        ("second", ("memory",), ("memory",)),
        ("third", ("memory",), ("memory",)),
        ("begin", ("prefix", "memory"), ("hidden", "gate")),
        ("cross1", ("hidden", "memory", "gate", "mask"), ("hidden", "gate")),
        ("cross2", ("hidden", "memory", "gate", "mask"), ("hidden", "gate")),
        ("cross3", ("hidden", "memory", "gate", "mask"), ("hidden", "gate")),
        ("middle", ("hidden",), ("hidden",)),
        ("last", ("hidden", "source"), ("hidden",)),
    )

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Mlp(), Attention(), Ema()
        self.begin, self.cross1, self.cross2, self.cross3 = _Begin(), _Cross(), _Cross(), _Cross()
        self.middle, self.last = Attention(), _Last()

    def forward(self, source: Tensor, prefix: Tensor, mask: Tensor) -> Tensor:
        memory = self.third(self.second(self.first(source)))
        hidden, gate = self.begin(prefix, memory)
        for cross in (self.cross1, self.cross2, self.cross3):
            hidden, gate = cross(hidden, memory, gate, mask)
        return torch.as_tensor(self.last(self.middle(hidden), source))


class _Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.linear(hidden).chunk(2, -1)
        return left, right


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH // 2, WIDTH // 2)

    def forward(self, left: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.tanh(self.linear(left))
        return made, made


class _Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH // 2, WIDTH // 2)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(left) * right, right.transpose(1, 2)


class _Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH // 2, WIDTH // 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.cat((left, self.linear(right.transpose(1, 2))), -1)


class Aliases(nn.Module):
    """Values that share memory, one tensor under two names, and views of what else goes on."""

    wires: Wires = (
        ("before", ("input",), ("hidden",)),
        ("halves", ("hidden",), ("left", "right")),
        ("twice", ("left",), ("left", "copy")),
        ("joined", ("left", "right"), ("left", "right")),
        ("again", ("copy",), ("copy", "other")),
        ("both", ("copy", "other"), ("copy", "turned")),
        ("turned", ("left", "right"), ("hidden",)),
        ("added", ("copy", "turned"), ("extra",)),
        ("after", ("hidden", "extra"), ("hidden",)),
    )

    def __init__(self) -> None:
        super().__init__()
        self.before, self.halves, self.twice, self.joined = Mlp(), _Halves(), _Twice(), _Joined()
        self.again, self.both, self.turned, self.added, self.after = _Twice(), _Joined(), _Turned(), _Turned(), _Sum()

    def forward(self, input: Tensor) -> Tensor:
        left, right = self.halves(self.before(input))
        left, copied = self.twice(left)
        left, right = self.joined(left, right)
        copied, other = self.again(copied)
        copied, turned = self.both(copied, other)
        hidden = self.turned(left, right)
        return torch.as_tensor(self.after(hidden, self.added(copied, turned)))


class _Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Mlp()

    def forward(self, hidden: Tensor, extra: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(hidden + extra))


class _Words(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(words, WIDTH), nn.Embedding(32, WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.embedding(tokens) + self.places(positions), tokens == 0, tokens * 2


class _MaskedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.odd = Mlp(), nn.Embedding(2, WIDTH)

    def forward(self, hidden: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(hidden.masked_fill(mask.unsqueeze(-1), 0.0)) + self.odd(tokens % 2))


class _Heads(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.kind = nn.Linear(WIDTH, words), nn.Linear(WIDTH, 3)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.words(hidden), self.kind(hidden[:, 0])


class Masked(nn.Module):
    """Masked words and a kind of sample: masks and numbers cross the cuts, and two parts make the loss."""

    WORDS = 40
    wires: Wires = (
        ("words", ("input",), ("hidden", "mask", "doubled")),
        *((f"layer{i}", ("hidden", "mask", "doubled"), ("hidden",)) for i in range(4)),
        *((f"attention{i}", ("hidden",), ("hidden",)) for i in range(3)),
        ("heads", ("hidden",), ("words", "kind")),
    )

    def __init__(self) -> None:
        super().__init__()
        self.words = _Words(self.WORDS)
        for index in range(4):
            self.add_module(f"layer{index}", _MaskedLayer())
        for index in range(3):
            self.add_module(f"attention{index}", Attention())
        self.heads = _Heads(self.WORDS)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        hidden, mask, doubled = self.words(input)
        for index in range(4):
            hidden = self.get_submodule(f"layer{index}")(hidden, mask, doubled)
        for index in range(3):
            hidden = self.get_submodule(f"attention{index}")(hidden)
        words, kind = self.heads(hidden)
        return words, kind


class _Down(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        made = functional.silu(self.linear(hidden))
        return made, made * 0.5


class _Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor, skipped: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(torch.cat((hidden, skipped), -1)))


class Skips(nn.Module):
    """A U: what went down is used on the way up, over several cuts."""

    wires: Wires = (
        ("down0", ("input",), ("hidden", "skip0")),
        ("down1", ("hidden",), ("hidden", "skip1")),
        ("down2", ("hidden",), ("hidden", "skip2")),
        ("middle0", ("hidden",), ("hidden",)),
        ("middle1", ("hidden",), ("hidden",)),
        ("up2", ("hidden", "skip2"), ("hidden",)),
        ("up1", ("hidden", "skip1"), ("hidden",)),
        ("up0", ("hidden", "skip0"), ("hidden",)),
        ("end", ("hidden", "input"), ("hidden",)),
    )

    def __init__(self) -> None:
        super().__init__()
        self.down0, self.down1, self.down2 = _Down(), _Down(), _Down()
        self.middle0, self.middle1 = Mlp(), Attention()
        self.up2, self.up1, self.up0, self.end = _Up(), _Up(), _Up(), _Up()

    def forward(self, input: Tensor) -> Tensor:
        hidden, skip0 = self.down0(input)
        hidden, skip1 = self.down1(hidden)
        hidden, skip2 = self.down2(hidden)
        hidden = self.middle1(self.middle0(hidden))
        hidden = self.up0(self.up1(self.up2(hidden, skip2), skip1), skip0)
        return torch.as_tensor(self.end(hidden, input))
