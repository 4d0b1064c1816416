"""The account itself: what is held by whom, peaks, and the limit."""

from __future__ import annotations

import pytest

from vpipe.errors import MemoryLimitError
from vpipe.runtime.memory.ledger import KINDS, Ledger


def activations(ledger: Ledger) -> int:
    return ledger.now.by_kind["activations"]


def test_memory_that_several_hold_counts_once() -> None:
    ledger = Ledger(0)
    ledger.replace("a", {64: 100, 128: 50})
    ledger.replace("b", {128: 50})
    assert activations(ledger) == 150
    ledger.replace("a", {})
    assert activations(ledger) == 50
    assert ledger.is_held(128)
    assert not ledger.is_held(64)
    ledger.replace("b", {})
    assert ledger.now.total == 0


def test_what_an_owner_holds_is_replaced() -> None:
    ledger = Ledger(0)
    ledger.replace("a", {64: 100, 128: 50})
    ledger.replace("a", {128: 50, 192: 7})
    assert activations(ledger) == 57
    ledger.hold("a", 192, 7)  # again, by the same owner
    ledger.release("a", 192)
    ledger.release("a", 192)
    assert activations(ledger) == 50


def test_what_comes_back_is_counted_although_its_address_is_still_named() -> None:
    ledger = Ledger(0)
    ledger.replace("a", {64: 100})
    token = ledger.hold_new("b", 30)
    assert activations(ledger) == 130
    ledger.release("b", token)
    assert activations(ledger) == 100


def test_sums_are_replaced_by_key() -> None:
    ledger = Ledger(0)
    ledger.put("gradients", 0, 10)
    ledger.put("gradients", 1, 5)
    ledger.put("gradients", 0, 0)
    assert ledger.now.by_kind["gradients"] == 5


def test_the_peak_is_a_moment_and_each_kind_has_its_own() -> None:
    ledger = Ledger(0)
    ledger.put("parameters", 0, 100)
    ledger.replace("a", {64: 40})
    ledger.settle("0F0", 5)
    assert (ledger.peak.total, ledger.peak.action) == (145, "0F0")
    ledger.replace("a", {})
    ledger.put("gradients", 0, 30)
    # Before its end the backward still held the activations: nothing was higher than that moment.
    ledger.settle("0B0", 20)
    assert (ledger.peak.total, ledger.peak.action) == (160, "0B0")
    assert ledger.peak.by_kind == {**dict.fromkeys(KINDS, 0), "parameters": 100, "activations": 40, "workspace": 20}
    ledger.settle("0STEP0", 0)
    assert ledger.peak_by_kind == {
        **dict.fromkeys(KINDS, 0),
        "parameters": 100,
        "activations": 40,
        "gradients": 30,
        "workspace": 20,
    }


def test_a_limit_is_kept_to_the_byte() -> None:
    ledger = Ledger(2, limit=1500)
    ledger.put("parameters", 0, 1000)
    ledger.replace("a", {64: 400})
    ledger.settle("0F0", 100)
    with pytest.raises(
        MemoryLimitError,
        match=r"rank 2 held 1,501 bytes in 0B0, 1 more than its memory limit of 1,500 "
        r"\(parameters 1,000, activations 400, workspace 101\); let more blocks recompute or swap",
    ):
        ledger.settle("0B0", 101)
