"""Copies that go on beside a computation: as many as asked for, and nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from vpipe.measure.copies import Copier
from vpipe.planner.profile.profile import LinkProfile

MIB = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture
def copier() -> Iterator[Copier]:
    with closing(Copier(CPU, LinkProfile(0.0, MIB))) as made:  # half a millisecond for each of 128 parcels
        yield made


@pytest.mark.parametrize(("asked", "expected"), [(0.1, 0.5), (7.2, 7.0), (150.0, 150.0)])
def test_it_copies_for_about_as_long_as_asked(copier: Copier, asked: float, expected: float) -> None:
    assert copier.begin(asked) == expected
    copier.finish()
    assert copier.bytes_copied == expected * MIB


def test_what_comes_back_is_what_left(copier: Copier) -> None:
    copier.begin(40.0)
    copier.finish()
    assert sum(parcel.device is None for parcel in copier.parcels) == 80
    for _ in range(3):
        copier.begin(40.0)  # the last ones out and the first ones back; all but the last ones back; and out again
        copier.finish()
    assert sum(parcel.device is None for parcel in copier.parcels) == 64
    copier.begin(32.0)
    copier.finish()
    copier.begin(64.0 + 128.0)  # back, and once more out and back
    copier.finish()
    assert all(bool((parcel.content() == 1).all()) for parcel in copier.parcels)


def test_a_link_of_unknown_speed_copies_once() -> None:
    with closing(Copier(CPU, LinkProfile())) as copier:
        assert copier.begin(5.0) == 0.0
        copier.finish()
        assert copier.bytes_copied == MIB // 2


def test_on_a_gpu_the_host_waits_as_well(copier: Copier, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(copier.bytes_copied))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(copier, "_device", torch.device("cuda"))
    copier.begin(2.0)
    copier.finish()
    assert waited == [2 * MIB]
