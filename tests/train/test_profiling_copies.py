"""Copies that go on beside a computation: as many as asked for, and nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from vpipe.plan.profile import LinkProfile
from vpipe.train.profiling.copies import Copier

MIB = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture
def copier() -> Iterator[Copier]:
    with closing(Copier(CPU, LinkProfile(0.0, MIB))) as made:  # a parcel takes 1 ms each way
        yield made


@pytest.mark.parametrize(("asked", "expected"), [(0.1, 2.0), (7.0, 8.0), (100.0, 100.0)])
def test_it_copies_for_about_as_long_as_asked(copier: Copier, asked: float, expected: float) -> None:
    assert copier.begin(asked) == expected
    copier.finish()
    assert copier.bytes_copied == expected * MIB


def test_what_comes_back_is_what_left(copier: Copier) -> None:
    copier.begin(1000.0)  # every parcel several times
    copier.finish()
    assert all(bool((parcel.content() == 1).all()) for parcel in copier.parcels)
    copier.begin(3.0)
    copier.finish()
    assert all(bool((parcel.content() == 1).all()) for parcel in copier.parcels)


def test_a_link_of_unknown_speed_copies_once() -> None:
    with closing(Copier(CPU, LinkProfile())) as copier:
        assert copier.begin(5.0) == 0.0
        copier.finish()
        assert copier.bytes_copied == 2 * MIB
