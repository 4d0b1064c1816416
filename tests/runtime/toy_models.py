"""Small chains with everything that is hard for a pipeline, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpipe.model.chain import Block, Chain, ParameterRef
from vpipe.model.loss import CallableLoss

WIDTH = 6
NUM_TOKENS = 11
LENGTH = 3


def plain_modules() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 7), nn.LayerNorm(7), nn.Dropout(0.2),
        nn.Linear(7, WIDTH),
    )  # fmt: skip


def plain() -> Chain:
    """Seven modules in a row, two of them with dropout; every rank builds the same."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        modules = plain_modules()
    return Chain.from_modules(modules, CallableLoss(nn.functional.mse_loss))


class Checkpointed(nn.Sequential):
    """Recomputes by itself, with whatever weights it has then."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return result


class Turned(nn.Linear):
    """Returns a value that lies in memory the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).T.contiguous().T


class Hooked(nn.Linear):
    """Has hooks for its gradients, of which one depends on how they add up, and reads a mark of its weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.register_hook(lambda gradient: gradient * 0.5)
        self.bias.register_post_accumulate_grad_hook(_clamp)
        self.weight.scale = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.scale


def _clamp(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.clamp_(-0.01, 0.01)


class Uncertain(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 0.1))

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(hidden, target) * torch.exp(-self.scale) + self.scale


def peculiar() -> Chain:
    """Seven modules that do what users do, and a loss that is trained."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        modules = nn.Sequential(
            Checkpointed(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, 9)), Turned(9, 13), nn.GELU(), Hooked(13, 11),
            Turned(11, 9), Checkpointed(nn.Linear(9, 9), nn.GELU()), nn.Linear(9, WIDTH),
        )  # fmt: skip
    return Chain.from_modules(modules, Uncertain())


@dataclass(frozen=True)
class State:
    """What some modules hand on."""

    hidden: Tensor
    extras: dict[str, object]


class Spread(nn.Module):
    """Writes a dictionary, in which one tensor is met twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> dict[str, object]:
        hidden = self.linear(hidden)
        parts = [torch.tanh(hidden), torch.nn.functional.dropout(hidden, 0.3, self.training)]
        return {"hidden": hidden, "parts": parts, "again": parts[0], "mask": None, "places": torch.arange(len(hidden))}


class Folded(nn.Module):
    """Reads what `Spread` writes, and writes a dataclass in which nothing but one tensor needs a gradient."""

    def forward(self, given: dict[str, object]) -> State:
        first, second = given["parts"]
        hidden = given["hidden"] * first + second * given["again"] * (1 + given["places"]).unsqueeze(1)
        return State(hidden, {"sign": hidden.detach().sign(), "power": 2, "mask": given["mask"]})


class Within(nn.Module):
    """Changes the tensor in a dataclass and hands the rest on."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, state: State) -> State:
        return State(self.layers(state.hidden) + state.extras["sign"] ** state.extras["power"], state.extras)


class Read(nn.Module):
    """Ends in a tuple of two outputs, which the loss reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        return self.linear(state.hidden), {"raw": state.hidden}


def _distance_of_both(outputs: tuple[Tensor, dict[str, Tensor]], target: Tensor) -> Tensor:
    hidden, others = outputs
    return nn.functional.mse_loss(hidden, target) + 0.1 * others["raw"].square().mean()


def nested() -> Chain:
    """Seven modules between which dictionaries, lists, dataclasses and tuples go."""
    with torch.random.fork_rng():
        torch.manual_seed(10)
        modules = [nn.Linear(WIDTH, WIDTH), Spread(WIDTH), Folded(), Within(nn.Linear(WIDTH, WIDTH), nn.Tanh())]
        modules += [Within(nn.Dropout(0.2)), Within(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)), Read(WIDTH)]
    return Chain.from_modules(modules, CallableLoss(_distance_of_both))


def seeded_modules() -> nn.Sequential:
    """Seven modules in which nothing is random; every call gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(8)
        first = [nn.Linear(WIDTH, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 9)]
        return nn.Sequential(*first, nn.GELU(), nn.BatchNorm1d(9), nn.Linear(9, WIDTH))


def seeded() -> Chain:
    """What anyone can train in a loop of plain PyTorch."""
    return Chain.from_modules(seeded_modules(), CallableLoss(nn.functional.mse_loss))


def normalised() -> Chain:
    """Batch norm in training mode: buffers that every forward changes."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        modules = [nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)]
        modules += [nn.Dropout(0.3), nn.Linear(8, WIDTH)]
    return Chain.from_modules(modules, CallableLoss(nn.functional.mse_loss))


def moded() -> Chain:
    """Parts in evaluation mode among others: frozen norms, in a nested part too, and dropout that is off."""
    with torch.random.fork_rng():
        torch.manual_seed(12)
        inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Dropout(0.4))
        modules = [nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), inner, nn.BatchNorm1d(8), nn.Dropout(0.3)]
        modules += [nn.Linear(8, WIDTH)]
        for norm in (part for module in modules for part in module.modules() if isinstance(part, nn.BatchNorm1d)):
            assert norm.running_var is not None
            norm.running_var.uniform_(0.5, 2)
    modules[1].eval().requires_grad_(False)
    inner[1].eval()
    inner[2].eval()
    return Chain.from_modules(modules, CallableLoss(nn.functional.mse_loss))


def weightless() -> Chain:
    """Blocks, and with the right cuts whole stages, that have no parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        modules = [nn.Tanh(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4), nn.Sigmoid()]
        modules += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return Chain.from_modules(modules, CallableLoss(nn.functional.l1_loss))


class Embed(nn.Module):
    """Token ids in; a hidden value, a mask of booleans and positions of integers out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(NUM_TOKENS, WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        return self.table(tokens), tokens != 0, positions


class Mix(nn.Module):
    """Changes the hidden value with the mask, and offers what it saw as a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.25)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.drop(self.inner(hidden * mask[..., None]).relu()), hidden


class Join(nn.Module):
    """Takes the skip connection up again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, skip: Tensor) -> Tensor:
        return self.inner(hidden) + skip


class Place(nn.Module):
    """Reads the integers, long after they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(LENGTH, WIDTH)

    def forward(self, hidden: Tensor, positions: Tensor, skip: Tensor) -> Tensor:
        return torch.tanh(hidden + self.table(positions) - skip)


class Classify(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(NUM_TOKENS, WIDTH).normal_(0, 0.5))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


@dataclass(frozen=True)
class MaskedLoss:
    """Two parts with targets that some samples do not have, so microbatches weigh differently."""

    inputs: tuple[str, ...] = ("logits", "hidden", "tokens", "labels")
    parts: tuple[str, ...] = ("words", "size")

    def count(self, fields: Mapping[str, Tensor], num_samples: int) -> dict[str, float]:
        return {"words": float((fields["labels"] >= 0).sum()), "size": float(num_samples)}

    def __call__(
        self, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        words = nn.functional.cross_entropy(
            tensors["logits"].flatten(0, 1), tensors["labels"].flatten(), ignore_index=-1, reduction="sum"
        )
        size = tensors["hidden"].square().mean(dim=(1, 2)).sum()
        return {"words": words / totals["words"], "size": 0.1 * size / totals["size"]}


def skipping(tied: tuple[tuple[ParameterRef, ...], ...] = ()) -> Chain:
    """Skip connections over several cuts, integers and booleans across cuts, a field read far from the start."""
    blocks = (
        Block("embed", Embed, ("tokens",), ("hidden", "mask", "positions")),
        Block("mix", Mix, ("hidden", "mask"), ("hidden", "skip")),
        Block("again", Mix, ("hidden", "mask"), ("hidden", "later")),
        Block("join", Join, ("hidden", "skip"), ("hidden",)),
        Block("place", Place, ("hidden", "positions", "skip"), ("hidden",)),
        Block("last", Join, ("hidden", "later"), ("hidden",)),
        Block("head", Classify, ("hidden",), ("logits",)),
    )
    return Chain(blocks, ("tokens", "labels"), MaskedLoss(), tied)


def tied() -> Chain:
    """Three copies of one weight in the first, a middle and the last block."""
    chain = skipping()
    middle = Block("again", TiedMix, ("hidden", "mask"), ("hidden", "later"))
    refs = (ParameterRef(0, "table.weight"), ParameterRef(2, "table"), ParameterRef(6, "weight"))
    return Chain((*chain.blocks[:2], middle, *chain.blocks[3:]), chain.fields, chain.loss, (refs,))


def tied_frozen() -> Chain:
    """One weight twice, and neither copy trained."""
    chain = skipping()
    first = Block("embed", lambda: Embed().requires_grad_(False), ("tokens",), ("hidden", "mask", "positions"))
    last = Block("head", lambda: Classify().requires_grad_(False), ("hidden",), ("logits",))
    refs = (ParameterRef(0, "table.weight"), ParameterRef(6, "weight"))
    return Chain((first, *chain.blocks[1:6], last), chain.fields, chain.loss, (refs,))


class TiedMix(Mix):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(NUM_TOKENS, WIDTH).normal_(0, 0.5))

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mixed, skip = super().forward(hidden, mask)
        return mixed + (mixed @ self.table.T).softmax(-1) @ self.table, skip


def frozen() -> Chain:
    """The first blocks are not trained, so the values after them need no gradient; nor is a bias further on."""

    def join() -> nn.Module:
        module = Join()
        module.inner.bias.requires_grad_(False)
        return module

    chain = skipping()
    blocks = [
        Block("embed", lambda: Embed().requires_grad_(False), ("tokens",), ("hidden", "mask", "positions")),
        Block("mix", lambda: Mix().requires_grad_(False), ("hidden", "mask"), ("hidden", "skip")),
        chain.blocks[2],
        Block("join", join, ("hidden", "skip"), ("hidden",)),
    ]
    return Chain((*blocks, *chain.blocks[4:]), chain.fields, chain.loss)


class Cut(nn.Module):
    """Reads a value without depending on it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, skip: Tensor) -> Tensor:
        return self.inner(hidden) + skip.detach()


class Branch(nn.Module):
    """Two values, each from a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(hidden), self.right(hidden)


def stopped() -> Chain:
    """A value crosses cuts, called loss for good measure, and nothing depends on it: its weight has no gradient."""
    blocks = (
        Block("first", lambda: nn.Linear(WIDTH, WIDTH), ("input",), ("hidden",)),
        Block("branch", Branch, ("hidden",), ("hidden", "loss")),
        Block("act", nn.Tanh, ("hidden",), ("hidden",)),
        Block("cut", Cut, ("hidden", "loss"), ("hidden",)),
        Block("end", lambda: nn.Linear(WIDTH, WIDTH), ("hidden",), ("hidden",)),
    )
    return Chain(blocks, ("input", "target"), CallableLoss(nn.functional.mse_loss))


class Weigh(nn.Module):
    """Offers a number per token that needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.inner(hidden)), hidden.detach().abs().mean(-1, keepdim=True)


class Scale(nn.Module):
    """Takes the number up again."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, hidden: Tensor, share: Tensor) -> Tensor:
        return self.drop(hidden * (1 + share))


def winding() -> Chain:
    """Enough blocks for eight stages: skip connections, integers, booleans and numbers without gradient across cuts."""
    chain = skipping()
    weigh = Block("weigh", Weigh, ("hidden",), ("hidden", "share"))
    scale = Block("scale", Scale, ("hidden", "share"), ("hidden",))
    return Chain((*chain.blocks[:2], weigh, *chain.blocks[2:5], scale, *chain.blocks[5:]), chain.fields, chain.loss)


MODELS: dict[str, Callable[[], Chain]] = {
    "frozen": frozen,
    "nested": nested,
    "moded": moded,
    "normalised": normalised,
    "peculiar": peculiar,
    "plain": plain,
    "seeded": seeded,
    "skipping": skipping,
    "stopped": stopped,
    "tied": tied,
    "tied_frozen": tied_frozen,
    "weightless": weightless,
    "winding": winding,
}


def make_batch(chain: Chain, number: int, num_samples: int) -> dict[str, Tensor]:
    """Return batch `number`: the same in every process."""
    generator = torch.Generator().manual_seed(1000 + number)
    if chain.fields == ("input", "target"):
        shape = (num_samples, WIDTH)
        return {name: torch.randn(shape, generator=generator) for name in chain.fields}
    tokens = torch.randint(0, NUM_TOKENS, (num_samples, LENGTH), generator=generator)
    hidden = torch.rand((num_samples, LENGTH), generator=generator) < 0.4
    hidden[0] = False  # so that no batch is without targets
    return {"tokens": tokens, "labels": tokens.masked_fill(hidden, -1)}
