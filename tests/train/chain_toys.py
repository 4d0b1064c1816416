"""A user's own file: chains, well-behaved and not, and their data, as `model.entry` and `data.entry` name them.

Tests copy it beside the run's YAML; it is not imported by them.
"""

import os
import random
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from vpipe.model.chain import Block, Chain
from vpipe.model.loss import CallableLoss

WIDTH = 6


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, value):
        return value + self.dropout(torch.tanh(self.linear(value)))


class Normed(Layer):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, value):
        return self.norm(super().forward(value))


class Diverging(Layer):
    def forward(self, value):
        return super().forward(value) * float("nan")


class RankDependent(Layer):
    def forward(self, value):
        return super().forward(value) * (1 + int(os.environ.get("RANK", "0")))


class Stumbling(Layer):
    def forward(self, value):
        if not value.is_meta:
            raise ValueError("surprise")
        return super().forward(value)


LAYERS = {layer.__name__: layer for layer in (Layer, Normed, Diverging, RankDependent, Stumbling)}


def chain(last="Layer", num_blocks=4):
    kinds = [Layer] * (num_blocks - 1) + [LAYERS[last]]
    blocks = tuple(
        Block(f"block.{index}", kind, ("hidden" if index else "input",), ("hidden",))
        for index, kind in enumerate(kinds)
    )
    return Chain(blocks, ("input", "target"), CallableLoss(nn.functional.mse_loss))


def unseeded():
    modules = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    modules[1].weight = nn.Parameter(torch.from_numpy(np.random.rand(WIDTH, WIDTH)).float() * random.random())
    return Chain.from_modules(modules, CallableLoss(nn.functional.mse_loss))


def shared():
    layer = nn.Linear(WIDTH, WIDTH)
    return Chain.from_modules(nn.Sequential(layer, nn.Tanh(), layer), CallableLoss(nn.functional.mse_loss))


class Labelled(nn.Linear):
    label = "new"

    def get_extra_state(self):
        return self.label

    def set_extra_state(self, state):
        self.label = state


def named_modules():
    inner = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(WIDTH), deep=nn.Sequential(nn.Linear(WIDTH, WIDTH))))
    model = nn.Sequential(
        OrderedDict(stem=nn.Linear(WIDTH, WIDTH), body=inner, act=nn.Tanh(), head=Labelled(WIDTH, WIDTH))
    )
    model.head.weight = model.stem.weight
    return model


def named():
    return Chain.from_modules(named_modules(), CallableLoss(nn.functional.mse_loss))


def failing():
    raise RuntimeError("no such layer")


def data(split, width=WIDTH, num_samples=40):
    generator = torch.Generator().manual_seed(len(split))
    value = torch.randn(num_samples, width, generator=generator)
    return {"input": value, "target": value.flip(1)}


def unseeded_data(split):
    value = torch.randn(40, WIDTH)
    return {"input": value, "target": value.flip(1)}


def data_of_rank(split):
    value = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(int(os.environ.get("RANK", "0"))))
    return {"input": torch.zeros(40, WIDTH), "target": value}


def without_target(split):
    return {"input": torch.zeros(40, WIDTH)}
