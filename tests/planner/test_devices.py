"""The table of devices and links, and how users name them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vpipe.errors import PlanError
from vpipe.planner.estimate.devices import DEVICES, LINKS, LinkSpec, find_device, find_link


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_device_makes_sense(device: Any) -> None:
    assert device.link in LINKS
    assert device.source
    assert device.matmul_fraction.keys() == device.peak_tflops.keys()
    assert all(0 < fraction <= 0.9 for fraction in device.matmul_fraction.values())
    assert 0 < device.memory_fraction <= 1
    assert f"{device.memory_bytes >> 30}gb" in device.name
    peaks = list(device.peak_tflops.values())
    assert peaks == sorted(peaks, reverse=True), "the first type is the default"


def test_data_sheets() -> None:
    a100, h100 = find_device("a100-80gb"), find_device("h100-80gb")
    assert (a100.peak_tflops["bf16"], a100.memory_bytes, a100.memory_gb_per_s) == (312, 80 << 30, 2039)
    assert (h100.peak_tflops["bf16"], h100.memory_gb_per_s) == (989.4, 3350)
    assert "bf16" not in find_device("v100-16gb").peak_tflops


def test_an_unknown_device_is_told_with_those_there_are() -> None:
    with pytest.raises(
        PlanError, match=r"unknown device 'a100-80g'; did you mean 'a100-80gb'\?; known are v100-16gb, "
    ):
        find_device("a100-80g")


def test_a_file_describes_a_device(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    content = asdict(DEVICES["a100-40gb"]) | {"matmul_fraction": 0.5}
    del content["name"], content["source"]
    path.write_text(json.dumps(content))
    device = find_device(str(path))
    assert (device.name, device.memory_gb_per_s) == ("mine", 1555)
    assert device.matmul_fraction == dict.fromkeys(device.peak_tflops, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_bytes": None}, "memory_bytes = None is not a number above 0"),
        ({"kernel_us": -1}, "kernel_us = -1 is not a number above 0"),
        ({"memory_fraction": 1.5}, "memory_fraction = 1.5 is above 1"),
        ({"matmul_fraction": 2}, "matmul_fraction.bf16 = 2 is above 1"),
        ({"matmul_fraction": {"bf16": 0.5}}, "matmul_fraction = {'bf16': 0.5} is neither a number nor one for each of"),
        ({"peak_tflops": {}}, "peak_tflops = {} is not an object"),
        ({"peak_tflops": {"bf16": True}, "matmul_fraction": 0.5}, "peak_tflops.bf16 = True is not a number above 0"),
        ({"link": "wire"}, "link = 'wire' is not one of nvlink2"),
        ({"link_gb": 3}, "'link_gb' is not a key of a device; did you mean 'link'?"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(asdict(DEVICES["a100-40gb"]) | changes))
    with pytest.raises(PlanError) as error:
        find_device(str(path))
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no device"),
        ("[]", "is not a JSON object with name, peak_tflops"),
        ('{"peak_tflops": {"bf16": 1}}', "has no 'memory_bytes'"),
    ],
)
def test_a_file_of_something_else_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        find_device(str(path))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json: is no device"):
        find_device(str(tmp_path / "none.json"))


@pytest.mark.parametrize("text", ["5us,25GB/s", "5 us, 25 gb/s"])
def test_a_link_can_be_written(text: str) -> None:
    assert find_link(text) == LinkSpec(text, 5.0, 25.0)


@pytest.mark.parametrize("text", ["infiniband-hd", "5us", "5us,0GB/s", "5us,1.2.3GB/s"])
def test_an_unknown_link_is_told(text: str) -> None:
    near = "; did you mean 'infiniband-hdr'?" if text == "infiniband-hd" else ""
    with pytest.raises(PlanError) as error:
        find_link(text)
    assert str(error.value).startswith(f"unknown link '{text}'{near}; known are nvlink2, ")


def test_what_copies_to_the_host_take_from_computations_may_be_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    content = asdict(DEVICES["a100-80gb"])
    path.write_text(json.dumps({**content, "host_share": 0.25}))
    assert find_device(str(path)).host_share == 0.25
    path.write_text(json.dumps({**content, "host_share": -1}))
    with pytest.raises(PlanError, match="host_share = -1 is not a finite number of at least 0"):
        find_device(str(path))
