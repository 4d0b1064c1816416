"""Layers as users write them: each does something that a pipeline could get wrong."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH = 48


class Mlp(nn.Module):
    """A residual layer with dropout."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(hidden + self.drop(self.down(functional.gelu(self.up(self.norm(hidden))))))


class Attention(nn.Module):
    """Causal attention with dropout inside of torch's own kernel."""

    def __init__(self, width: int = WIDTH, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        shape = (rows, length, self.heads, width // self.heads)
        q, k, v = (item.view(shape).transpose(1, 2) for item in self.qkv(self.norm(hidden)).chunk(3, dim=-1))
        drop = 0.1 if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True)
        return torch.as_tensor(hidden + self.out(mixed.transpose(1, 2).reshape(rows, length, width)))


class Own(nn.Module):
    """Runs a function on a linear layer's result and what went in."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


class Transposed(Own):
    """Returns a view whose rows are columns."""

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden + torch.tanh(self.linear(hidden))).transpose(1, 2)


class TransposedBack(Own):
    """Takes such a view."""

    def forward(self, hidden: Tensor) -> Tensor:
        back = hidden.transpose(1, 2)
        return torch.as_tensor(back + self.linear(back))


class Padded(Own):
    """Returns a narrow view of a larger tensor, which does not begin where that begins."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = functional.pad(self.linear(hidden), (3, 5))
        return wide[..., 3:-5].mul(0.5).add(hidden)


class Narrowed(Own):
    """Returns every second element of a larger tensor."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.stack((hidden, self.linear(hidden)), dim=-1)[..., 1]


class Expanded(Own):
    """Returns a mean over positions, expanded."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(hidden).mean(1, keepdim=True).expand_as(hidden))


class Windows(Own):
    """Adds up overlapping windows, which share memory."""

    def forward(self, hidden: Tensor) -> Tensor:
        windows = functional.pad(self.linear(hidden), (0, 0, 2, 0)).unfold(1, 3, 1)
        return hidden + windows.mean(-1)


class Strided(Own):
    """Looks at memory with strides of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.linear(hidden).contiguous()
        rows, length, width = made.shape
        backwards = made.as_strided((rows, width, length), (length * width, 1, width))
        return torch.as_tensor(backwards.transpose(1, 2) * torch.sigmoid(hidden))


class WritesToView(Own):
    """Changes a part of a fresh tensor in place, and a view of it."""

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.linear(hidden)
        made[:, ::2].mul_(0.5)
        made[..., : made.shape[-1] // 2] += hidden[..., made.shape[-1] // 2 :]
        return functional.relu_(made)


class InPlace(Own):
    """Changes in place what its own linear layer made."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.act, self.drop = nn.LeakyReLU(0.1, inplace=True), nn.Dropout(0.2, inplace=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.act(self.drop(self.linear(hidden)).add_(hidden)))


class Ema(Own):
    """Keeps moving averages: a buffer changed in place, and one that is replaced."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            found = hidden.detach().mean((0, 1))
            self.mean.mul_(0.9).add_(found, alpha=0.1)
            self.scale = self.scale * 0.9 + 0.1 * hidden.detach().std((0, 1))
        shifted = (hidden - self.mean) / (self.scale + 1e-3)
        return torch.as_tensor(hidden + self.linear(shifted))


class Counts(Own):
    """Counts its calls in a plain attribute."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return torch.as_tensor(hidden + self.linear(hidden) / (1 + 0.1 * self.calls))


class Attributes(Own):
    """Counts its calls, and keeps a tensor, in plain attributes."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.calls, self.last, self.sum = 0, torch.zeros(()), torch.zeros(width)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.last = 0.5 * self.last + hidden.detach().mean()
            self.sum += hidden.detach().mean((0, 1))
        shifted = hidden + 0.01 * self.calls + torch.tanh(self.last) - 0.01 * self.sum
        return torch.as_tensor(hidden + self.linear(shifted))


class Codebook(Own):
    """Quantises to the nearest code, straight through, and moves the codes in its forward."""

    codes: Tensor
    used: Tensor

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.register_buffer("codes", torch.randn(16, width))
        self.register_buffer("used", torch.zeros(16, dtype=torch.long))

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.linear(hidden)
        nearest = torch.cdist(made.detach().flatten(0, 1), self.codes).argmin(-1)
        picked = functional.one_hot(nearest, 16).to(made.dtype)
        if self.training:
            with torch.no_grad():
                self.used += picked.sum(0).long()
                sums = picked.t() @ made.detach().flatten(0, 1)
                self.codes.mul_(0.9).add_(sums / picked.sum(0).clamp(min=1).unsqueeze(1), alpha=0.1)
        quantised = (picked @ self.codes).view_as(made)
        return torch.as_tensor(hidden + made + (quantised - made).detach())


class LayerDrop(nn.Module):
    """Leaves its layer out at random: by Python's numbers, numpy's, or torch's."""

    def __init__(self, by: str, width: int = WIDTH) -> None:
        super().__init__()
        self.by, self.layer = by, Mlp(width, 0.2)

    def _number(self) -> float:
        if self.by == "random":
            return random.random()
        return float(np.random.rand()) if self.by == "numpy" else float(torch.rand(()))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training and self._number() < 0.4:
            return hidden * 1.0
        return torch.as_tensor(self.layer(hidden))


class Draws(Own):
    """Draws numbers in many ways, and some in evaluations, too."""

    def forward(self, hidden: Tensor) -> Tensor:
        noisy = self.linear(hidden) + 0.1 * torch.randn_like(hidden)
        if self.training:
            noisy = functional.rrelu(noisy, training=True) + torch.rand(hidden.shape[-1], device=hidden.device)
            order = torch.randperm(hidden.shape[1], device=hidden.device)
            noisy = noisy[:, order] * torch.bernoulli(torch.full_like(hidden, 0.9))
        return functional.alpha_dropout(noisy, 0.1, self.training) + hidden


class Complex(nn.Module):
    """A layer with complex weights and a Fourier transform; takes and returns complex values."""

    def __init__(self, width: int = WIDTH // 2) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=torch.complex64)
        self.scale = nn.Parameter(torch.randn(width, dtype=torch.complex64) / 4)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = torch.fft.ifft(torch.fft.fft(self.linear(hidden), dim=1) * self.scale, dim=1)
        return torch.as_tensor(hidden + mixed.conj() + torch.view_as_complex(torch.view_as_real(mixed).tanh()))


class ToComplex(nn.Module):
    """Real numbers, two by two."""

    def forward(self, hidden: Tensor) -> Tensor:
        real, imaginary = hidden.chunk(2, dim=-1)
        return torch.complex(real, imaginary)


class ToReal(nn.Module):
    """Back again."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.view_as_real(hidden).flatten(-2)


class Checkpointed(nn.Module):
    """Saves memory by itself."""

    def __init__(self, reentrant: bool, width: int = WIDTH, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layer = Mlp(width, 0.2) if layer is None else layer

    def forward(self, hidden: Tensor) -> Tensor:
        if self.reentrant and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        result = checkpoint(self.layer, hidden, use_reentrant=self.reentrant)
        return torch.as_tensor(result)


class HalfCheckpointed(Own):
    """Uses one weight inside of a checkpoint and outside of it."""

    def forward(self, hidden: Tensor) -> Tensor:
        inside = checkpoint(lambda value: torch.tanh(self.linear(value)), hidden, use_reentrant=False)
        return torch.as_tensor(self.linear(inside) + hidden)


class ForScript(nn.Module):
    """Becomes a script."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.drop(torch.tanh(self.first(self.norm(hidden))))
        if made.shape[0] > 1:
            made = made + 0.5 * self.second(made)
        return torch.as_tensor(hidden + made)


class InnerGradient(Own):
    """Differentiates in its forward, as models of energies and forces do."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.enable_grad():
            point = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
            energy = torch.tanh(self.linear(point)).pow(2).sum()
            (force,) = torch.autograd.grad(energy, point, create_graph=self.training)
        return hidden - 0.1 * force


class Transforms(Own):
    """Maps over samples with torch.func."""

    def forward(self, hidden: Tensor) -> Tensor:
        def one(sample: Tensor) -> Tensor:
            found = torch.func.jvp(torch.tanh, (self.linear(sample),), (sample,))
            return torch.as_tensor(found[0] + 0.1 * found[1])

        return hidden + torch.func.vmap(one)(hidden)


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, scale)
        return (hidden * scale).clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden, scale = ctx.saved_tensors
        gradient = gradients[0]
        return gradient * scale, (gradient * hidden).sum((0, 1))


class OwnFunction(Own):
    """Has a backward of its own: straight through a clamp."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = _Clamped.apply(self.linear(hidden), self.scale)  # type: ignore[no-untyped-call]
        return hidden + made


class Hooked(nn.Module):
    """Has hooks of every kind on itself and its parts."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layer, self.norm = Mlp(width), nn.LayerNorm(width)
        self.layer.register_forward_pre_hook(_shift)
        self.layer.up.register_forward_hook(_halve)
        self.layer.down.register_full_backward_hook(_double_gradient)
        self.norm.register_full_backward_pre_hook(_clip_gradient)
        self.register_forward_hook(_watch)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.norm(self.layer(hidden)))


def _shift(module: nn.Module, inputs: Any) -> Any:
    return (inputs[0] + 0.01,)


def _halve(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 0.5


def _double_gradient(module: nn.Module, of_inputs: Any, of_outputs: Any) -> Any:
    return tuple(None if item is None else item * 2 for item in of_inputs)


def _clip_gradient(module: nn.Module, of_outputs: Any) -> Any:
    return tuple(None if item is None else item.clamp(-1e-3, 1e-3) for item in of_outputs)


def _watch(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * 1.5)  # type: ignore[no-untyped-call]
    return output


class HookedWeights(nn.Module):
    """Has hooks on its parameters, one of them a method of its own."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layer, self.factor = Mlp(width), 0.5
        self.layer.up.weight.register_hook(_zero_first)  # type: ignore[no-untyped-call]
        self.layer.down.weight.register_hook(self.scaled)  # type: ignore[no-untyped-call]
        self.layer.down.bias.register_post_accumulate_grad_hook(_clamp_sum)  # type: ignore[no-untyped-call]

    def scaled(self, gradient: Tensor) -> Tensor:
        return gradient * self.factor

    def forward(self, hidden: Tensor) -> Tensor:
        result = self.layer(hidden)
        if result.requires_grad:
            result.register_hook(_scale_by_size)
        return torch.as_tensor(result)


def _zero_first(gradient: Tensor) -> Tensor:
    changed = gradient.clone()
    changed[0] = 0
    return changed


def _clamp_sum(parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.clamp_(-0.01, 0.01)


def _scale_by_size(gradient: Tensor) -> Tensor:
    return gradient / (1 + gradient.abs().max())


class Experts(nn.Module):
    """Sends each position to one of several layers, by what it finds."""

    def __init__(self, width: int = WIDTH, number: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(width, number)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(number))

    def forward(self, hidden: Tensor) -> Tensor:
        weights = self.gate(hidden).softmax(-1)
        best = weights.argmax(-1, keepdim=True)
        total = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            chosen = (best == index).to(hidden.dtype)
            total = total + chosen * weights[..., index : index + 1] * expert(hidden)
        return hidden + total


class Sometimes(nn.Module):
    """Uses a part of its weights for some microbatches alone, which torch's numbers choose."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.always, self.rarely = nn.Linear(width, width), nn.Linear(width, width)
        self.never = nn.Parameter(torch.ones(3))

    def forward(self, hidden: Tensor) -> Tensor:
        made = torch.tanh(self.always(hidden))
        if self.training and float(torch.rand(())) < 0.3:
            made = made + self.rarely(made)
        return made + hidden


class Recurrent(nn.Module):
    """A recurrent layer, of whose results one goes on."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], width: int = WIDTH) -> None:
        super().__init__()
        self.layer = kind(width, width, batch_first=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(hidden)[0]) + hidden


class Lists(nn.Module):
    """Keeps its weights in lists and dictionaries, and one of them as a view in forward."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.rows = nn.ParameterList([nn.Parameter(torch.randn(width, width) / 7) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": torch.zeros(width), "both": torch.randn(2 * width, width) / 7})

    def forward(self, hidden: Tensor) -> Tensor:
        first, second = self.named["both"].chunk(2)
        made = torch.einsum("btd,de->bte", hidden, self.rows[0] + first) @ self.rows[1].t()
        return hidden + torch.tanh(made @ second + self.named["shift"])


class Autocast(Own):
    """Computes a part in half precision."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = self.linear(hidden)
        return torch.as_tensor(hidden + made.float())


class Unforeseen(Own):
    """Makes tensors where torch makes them, and looks at numbers: no shape can be told without running it."""

    def forward(self, hidden: Tensor) -> Tensor:
        places = torch.arange(hidden.shape[1]) / hidden.shape[1] + torch.zeros(1)
        largest = hidden.detach().abs().max().item()
        return torch.as_tensor(hidden + self.linear(hidden * places.unsqueeze(-1)) / (1 + largest))


class Precise(nn.Module):
    """Computes, and keeps its weights, in double precision."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(hidden + self.linear(hidden.double()).float())


class Images(nn.Module):
    """Rows of numbers as images of 12 channels, in the order of memory that convolutions like."""

    def forward(self, hidden: Tensor) -> Tensor:
        cut = hidden.view(*hidden.shape[:-1], 12, -1)
        return cut.transpose(1, 2).contiguous(memory_format=torch.channels_last)


class Convolution(nn.Module):
    """Convolution, batch norm and a short cut."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(images)) + images)


class Pooled(nn.Module):
    """One prediction per sample."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.head(functional.adaptive_avg_pool2d(images, 1).flatten(1)))


class Flipped(nn.Module):
    """Batch norm over features, which have to come second."""

    def __init__(self, norm: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), norm

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(hidden + self.norm(self.linear(hidden).transpose(1, 2)).transpose(1, 2))


class Bag(nn.Module):
    """Words as the mean over a bag of them, with sparse gradients, and each word by itself."""

    def __init__(self, words: int, width: int = WIDTH) -> None:
        super().__init__()
        self.each = nn.Embedding(words, width, sparse=True)
        self.bag = nn.EmbeddingBag(words, width, mode="mean", sparse=True)
        for parameter in self.parameters():
            parameter.by_rows = True  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.each(tokens) + self.bag(tokens).unsqueeze(1))
