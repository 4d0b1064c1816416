"""The models of the sweep, by name: how a user makes one, what its batches are, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from benchmarks.equality import layers as own
from benchmarks.equality.layers import WIDTH, Attention, Mlp
from benchmarks.equality.loop import Task
from benchmarks.equality.losses import Plain, TwoParts, added, averaged, counted, two_parts
from benchmarks.equality.wholes import Aliases, Masked, Skips, Translator, Wires
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

__all__ = ["MODELS", "Model"]

LENGTH, WORDS, CLASSES = 12, 40, 7
Draw = Callable[[torch.Generator, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Model:
    """A model that a user might bring."""

    modules: Callable[[], nn.Module]
    """Makes the whole: an `nn.Sequential`, or one with a forward of its own and `wires`."""
    plain: Callable[[], Plain]
    loss: Callable[[], Any]
    """Makes what the pipeline is given as a loss."""
    said: Mapping[str, Any] = field(default_factory=dict)
    """What has to be said about the loss, as keywords of `vpipe.CallableLoss`."""
    batch: Draw = field(default=lambda generator, rows: _numbers(generator, rows))
    tied: tuple[tuple[str, ...], ...] = ()
    whole: tuple[str, ...] = ()
    fields: tuple[str, ...] = ("input", "target")
    learns_loss: bool = False

    @staticmethod
    def wires_of(model: nn.Module) -> Wires:
        """Return what each block of a whole reads and writes."""
        wires: Wires = model.wires  # type: ignore[assignment]
        return wires

    def task(self) -> Task:
        """Make the model and what a plain loop needs to know of it."""
        torch.manual_seed(5)
        model, ending = self.modules(), self.loss() if self.learns_loss else None
        loss = self.plain() if ending is None else averaged(ending)
        if isinstance(model, nn.Sequential):
            blocks = list(model)
        else:
            blocks = [model.get_submodule(name) for name, _, _ in self.wires_of(model)]
        inputs = [name for name in self.fields if name not in ("target", "label")]

        def forward(fields: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            outputs = model(*(fields[name] for name in inputs))
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return Task(model, blocks, forward, loss.shares, loss.count, self.whole, self.tied, ending)


def _numbers(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    shape = (rows, LENGTH, WIDTH)
    return {"input": torch.randn(shape, generator=generator), "target": torch.randn(shape, generator=generator)}


def _kinds(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    made = _numbers(generator, rows)
    return made | {"target": torch.randint(CLASSES, (rows,), generator=generator)}


def _words(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    made = torch.randint(WORDS, (2, rows, LENGTH), generator=generator)
    return {"input": made[0], "target": made[1]}


def _rare_words(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    """Most targets do not count, and some samples have none."""
    made = _words(generator, rows)
    hidden = torch.rand((rows, LENGTH), generator=generator) < 0.7
    hidden[1::3] = True
    hidden[0, 0] = False
    return made | {"target": made["target"].masked_fill(hidden, -100)}


def _sentences(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    made = _rare_words(generator, rows)
    made["target"][:, 3] = 1  # every sample has one, as its two parts are said by hand
    return made | {"label": torch.randint(3, (rows,), generator=generator)}


def _pairs(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    shape = (rows, LENGTH, WIDTH)
    source, prefix, target = (torch.randn(shape, generator=generator) for _ in range(3))
    mask = torch.full((LENGTH, LENGTH), -1e9).triu(1)
    return {"source": source, "prefix": prefix, "mask": mask, "target": target}


def _signs(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    made = _numbers(generator, rows)
    return made | {"target": (made["target"] > 0).float()}


def _row(*makers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Make an `nn.Sequential`, of 9 modules or more: 8 stages, and a cut that is not even."""
    return lambda: nn.Sequential(*(make() for make in makers))


def _plain_mean(modules: Callable[[], nn.Module], batch: Draw = _numbers, **more: Any) -> Model:
    return Model(modules, lambda: averaged(functional.mse_loss), lambda: functional.mse_loss, batch=batch, **more)


def _linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def _alternating(*makers: Callable[[], nn.Module], times: int = 3) -> Callable[[], nn.Module]:
    return _row(_linear, *makers * times, _linear)


def _kinds_of(*makers: Callable[[], nn.Module]) -> Model:
    loss = counted(
        functional.cross_entropy, partial(functional.cross_entropy, reduction="sum"), lambda t: float(t.numel())
    )
    return Model(_row(*makers), lambda: loss, lambda: functional.cross_entropy, batch=_kinds)


class _Second(nn.Module):
    """Classes second, as torch's losses want them."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.transpose(1, 2)


def _language(*, sparse: bool = False, is_tied: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        first, last = nn.Embedding(WORDS, WIDTH, sparse=sparse), nn.Linear(WIDTH, WORDS, bias=False)
        if sparse:
            first.weight.by_rows = True  # type: ignore[attr-defined]
        if is_tied:
            last.weight = first.weight
        return nn.Sequential(
            first, Attention(), Mlp(), Attention(), Mlp(), Attention(), Mlp(), nn.LayerNorm(WIDTH), last, _Second()
        )

    return make


def _uncounted(target: Tensor) -> float:
    return float((target != -100).sum())


def _of_words(modules: Callable[[], nn.Module], batch: Draw = _words, **more: Any) -> Model:
    summed = partial(functional.cross_entropy, reduction="sum")
    plain = counted(functional.cross_entropy, summed, _uncounted)
    return Model(modules, lambda: plain, lambda: functional.cross_entropy, batch=batch, **more)


def _class_weights() -> Tensor:
    # Halves and their multiples: what they add up to is the same in any order.
    return torch.tensor([0.5, 1.0, 1.5, 2.0] * (WORDS // 4))


def _weighed() -> Plain:
    weight = _class_weights()
    mean, summed = (nn.CrossEntropyLoss(weight=weight, ignore_index=-100, reduction=kind) for kind in ("mean", "sum"))

    def count(target: Tensor) -> float:
        return float(weight[target[target != -100]].sum())

    return counted(mean, summed, count)


def _tied_inside() -> nn.Module:
    """Two layers share weight and bias, and two norms a weight."""
    model = nn.Sequential(
        _linear(), Mlp(), _linear(), nn.Tanh(), Mlp(), _linear(), nn.LayerNorm(WIDTH), _linear(), nn.LayerNorm(WIDTH)
    )
    for name in ("weight", "bias"):
        setattr(model[5], name, getattr(model[2], name))
    model[8].weight = model[6].weight
    return model


def _frozen() -> nn.Module:
    model = nn.Sequential(
        _linear(), Mlp(), own.Flipped(nn.BatchNorm1d(WIDTH)), Mlp(), own.Draws(), Mlp(), Attention(), Mlp(), _linear()
    )
    for index in (0, 1, 2, 5):
        model[index].requires_grad_(False)
    model[6].get_submodule("qkv").requires_grad_(False)
    model[7].get_parameter("norm.bias").requires_grad_(False)
    return model


def _scripted() -> nn.Module:
    made = [torch.jit.script(own.ForScript()) for _ in range(4)]
    return nn.Sequential(_linear(), made[0], Mlp(), made[1], nn.Tanh(), made[2], Mlp(), made[3], _linear())


def _marked() -> nn.Module:
    """Weights with marks that the optimizer's function reads."""
    model = nn.Sequential(*(make() for make in (_linear, Mlp, Mlp, own.Lists, Mlp, own.Lists, Mlp, Mlp, _linear)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.no_decay = True  # type: ignore[attr-defined]
    return model


class _Learned(nn.Module):
    """A loss with weights of its own: a proxy for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(CLASSES, CLASSES) / 3)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output @ self.proxies, target)


def _pooling() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(LENGTH, CLASSES))


def _charbonnier(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target).square() + 1e-6).sqrt().mean()


def _by_positives(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square()[target > 0].sum() / (target > 0).sum()


def _large() -> nn.Module:
    """Weights of more than 32,768 elements, whose norm is taken in pieces."""
    wide = [nn.Linear(WIDTH, 800), nn.Linear(800, WIDTH)]
    return nn.Sequential(_linear(), Mlp(), wide[0], nn.GELU(), wide[1], Mlp(), nn.Dropout(0.1), Mlp(), _linear())


def _spectral(*, old: bool = False) -> Callable[[], nn.Module]:
    def layer() -> nn.Module:
        if old:
            return nn.utils.spectral_norm(_linear())
        return parametrizations.spectral_norm(_linear())

    def weighed() -> nn.Module:
        return parametrizations.weight_norm(_linear())  # type: ignore[no-any-return]

    return _row(_linear, layer, nn.Tanh, weighed, layer, nn.Tanh, Mlp, layer, _linear)


def _whole(kind: type[nn.Module], **more: Any) -> Model:
    return Model(kind, lambda: averaged(functional.mse_loss), lambda: functional.mse_loss, **more)


MODELS: dict[str, Model] = {
    "mlp": _plain_mean(_row(_linear, *(Mlp,) * 7, _linear)),
    "attention": _plain_mean(_alternating(Attention, Mlp, nn.GELU)),
    "transformer": _plain_mean(
        _alternating(partial(nn.TransformerEncoderLayer, WIDTH, 4, 96, 0.1, batch_first=True), nn.Identity, times=4)
    ),
    "convolution": _kinds_of(
        own.Images,
        *(partial(own.Convolution, 12),) * 3,
        partial(nn.MaxPool2d, 2),
        *(partial(own.Convolution, 12, 4),) * 2,
        nn.Dropout2d,
        partial(own.Pooled, 12, CLASSES),
    ),
    "views": _plain_mean(
        _row(
            _linear,
            own.Transposed,
            own.TransposedBack,
            own.Padded,
            own.Narrowed,
            own.Transposed,
            own.TransposedBack,
            own.Expanded,
            own.Windows,
            _linear,
        )
    ),
    "strided": _plain_mean(
        _row(own.Strided, own.Padded, own.Strided, own.Narrowed, Attention, own.Padded, own.Strided, Mlp, own.Narrowed)
    ),
    "in place": _plain_mean(
        _row(_linear, own.WritesToView, own.InPlace, Mlp, own.WritesToView, own.InPlace, own.WritesToView, Mlp, _linear)
    ),
    "batch norm": _plain_mean(
        _alternating(
            lambda: own.Flipped(nn.BatchNorm1d(WIDTH)),
            lambda: own.Flipped(nn.InstanceNorm1d(WIDTH, affine=True, track_running_stats=True)),
            lambda: own.Flipped(nn.BatchNorm1d(WIDTH, momentum=0.3)),
        )
    ),
    "spectral norm": _plain_mean(_spectral()),
    "old spectral norm": _plain_mean(_spectral(old=True)),
    "ema": _plain_mean(_alternating(own.Ema, Mlp)),
    "counts in attributes": _plain_mean(_alternating(own.Counts, Mlp)),
    "state in attributes": _plain_mean(_alternating(own.Attributes, Mlp)),
    "codebook": _plain_mean(_row(_linear, own.Codebook, Mlp, own.Codebook, own.Ema, Mlp, own.Codebook, Mlp, _linear)),
    "layer drop": _plain_mean(
        _row(
            _linear,
            *(partial(own.LayerDrop, by) for by in ("random", "numpy", "torch")),
            Mlp,
            *(partial(own.LayerDrop, by) for by in ("numpy", "random")),
            Mlp,
            _linear,
        )
    ),
    "draws": _plain_mean(_row(_linear, own.Draws, Mlp, own.Draws, own.Draws, Attention, own.Draws, Mlp, _linear)),
    "complex": _plain_mean(_row(_linear, own.ToComplex, *(own.Complex,) * 5, own.ToReal, _linear)),
    "sparse": _of_words(_language(sparse=True)),
    "sparse bag": _plain_mean(
        _row(partial(own.Bag, WORDS), *(Mlp,) * 7, _linear),
        batch=lambda generator, rows: _numbers(generator, rows) | {"input": _words(generator, rows)["input"]},
    ),
    "checkpoint": _plain_mean(
        _row(
            _linear,
            partial(own.Checkpointed, False),
            Mlp,
            own.HalfCheckpointed,
            partial(own.Checkpointed, False),
            Attention,
            own.HalfCheckpointed,
            partial(own.Checkpointed, False),
            _linear,
        )
    ),
    "checkpoint, reentrant": _plain_mean(
        _row(
            _linear,
            partial(own.Checkpointed, True),
            Mlp,
            partial(own.Checkpointed, True),
            nn.Tanh,
            partial(own.Checkpointed, True),
            Mlp,
            partial(own.Checkpointed, True),
            _linear,
        )
    ),
    "checkpoint that draws": _plain_mean(
        _row(
            _linear,
            lambda: own.Checkpointed(False, layer=own.Draws()),
            Mlp,
            lambda: own.Checkpointed(True, layer=own.Draws()),
            Mlp,
            lambda: own.Checkpointed(False, layer=Attention()),
            own.Ema,
            lambda: own.Checkpointed(True, layer=own.Lists()),
            _linear,
        )
    ),
    "scripted": _plain_mean(_scripted),
    "tied": _of_words(_language(is_tied=True), tied=(("0.weight", "8.weight"),)),
    "tied layers": _plain_mean(
        _tied_inside, tied=(("2.weight", "5.weight"), ("2.bias", "5.bias"), ("6.weight", "8.weight"))
    ),
    "frozen": _plain_mean(_frozen),
    "hooks of modules": _plain_mean(
        _row(own.Hooked, own.Hooked, Mlp, own.Hooked, nn.Tanh, own.Hooked, Mlp, own.Hooked, _linear)
    ),
    "hooks of weights": _plain_mean(
        _row(
            _linear,
            own.HookedWeights,
            Mlp,
            own.HookedWeights,
            own.HookedWeights,
            Attention,
            own.HookedWeights,
            Mlp,
            _linear,
        )
    ),
    "gradients inside": _plain_mean(
        _row(
            _linear,
            own.InnerGradient,
            Mlp,
            own.InnerGradient,
            own.InnerGradient,
            nn.Tanh,
            own.InnerGradient,
            Mlp,
            _linear,
        )
    ),
    "function transforms": _plain_mean(
        _row(_linear, own.Transforms, Mlp, own.Transforms, own.Transforms, nn.Tanh, own.Transforms, Mlp, _linear)
    ),
    "own function": _plain_mean(_alternating(own.OwnFunction, Mlp, own.OwnFunction)),
    "experts": _plain_mean(
        _row(_linear, own.Experts, own.Sometimes, Mlp, own.Experts, own.Sometimes, Mlp, own.Experts, _linear)
    ),
    "recurrent": _plain_mean(
        _row(
            _linear,
            partial(own.Recurrent, nn.LSTM),
            Mlp,
            partial(own.Recurrent, nn.GRU),
            nn.Tanh,
            partial(own.Recurrent, nn.LSTM),
            Mlp,
            partial(own.Recurrent, nn.GRU),
            _linear,
        )
    ),
    "marks": _plain_mean(_marked),
    "precisions": _plain_mean(
        _row(_linear, own.Autocast, own.Precise, Mlp, own.Autocast, nn.Tanh, own.Precise, own.Autocast, _linear)
    ),
    "unforeseen shapes": _plain_mean(
        _row(_linear, own.Unforeseen, Mlp, lambda: own.Flipped(nn.BatchNorm1d(WIDTH, momentum=None)), *(Mlp,) * 5)
    ),
    "large": _plain_mean(_large),
    "words that do not count": _of_words(_language(), batch=_rare_words),
    "classes that weigh": Model(
        _language(),
        _weighed,
        lambda: nn.CrossEntropyLoss(weight=_class_weights(), ignore_index=-100),
        batch=_rare_words,
    ),
    "learned loss": Model(
        _row(_linear, *(Mlp,) * 6, _linear, _pooling),
        lambda: averaged(functional.cross_entropy),
        _Learned,
        batch=_kinds,
        learns_loss=True,
    ),
    "sum": Model(
        _row(_linear, *(Mlp,) * 7, _linear),
        lambda: added(partial(functional.huber_loss, reduction="sum", delta=0.002)),
        lambda: nn.HuberLoss(reduction="sum", delta=0.002),
    ),
    "said sum": Model(
        _row(_linear, *(Mlp,) * 7, _linear),
        lambda: added(lambda output, target: (output - target).abs().sum() / 500),
        lambda: lambda output, target: (output - target).abs().sum() / 500,
        said={"reduction": "sum"},
    ),
    "binary": Model(
        _row(_linear, *(Mlp,) * 7, _linear),
        lambda: averaged(nn.BCEWithLogitsLoss(pos_weight=torch.linspace(0.5, 2, WIDTH))),
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.linspace(0.5, 2, WIDTH)),
        batch=_signs,
    ),
    "own mean": Model(
        _row(_linear, Mlp, nn.Dropout, *(Mlp,) * 5, _linear), lambda: averaged(_charbonnier), lambda: _charbonnier
    ),
    "own count": Model(
        _row(_linear, *(Mlp,) * 7, _linear),
        lambda: averaged(_by_positives, count=lambda fields: float((fields["target"] > 0).sum())),
        lambda: _by_positives,
        said={"num_targets": lambda target: (target > 0).sum()},
    ),
    "translator": _whole(Translator, batch=_pairs, whole=("mask",), fields=("source", "prefix", "mask", "target")),
    "aliases": _whole(Aliases),
    "skips": _whole(Skips),
    "two parts": Model(Masked, two_parts, TwoParts, batch=_sentences, fields=("input", "target", "label")),
}
