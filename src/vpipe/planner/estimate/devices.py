"""Devices and links that one need not own: what their makers say of them, and what share of that is reached.

Peaks, memory and bandwidths are the vendors' data sheets'. `matmul_fraction` is the share of the peak that matrix
products reach in training. For A100, H100 and V100 it is fitted to two published runs each, so that estimates of these
are right on average (benchmarks/estimate/fit.py; other runs test it). For L40S and GeForce it is 0.78 times the most
that matrix products alone were measured to reach (github.com/mag-/gpu_benchmark), which is what training leaves of it
on A100; RTX 2080 Ti is taken to be like V100, and fp32 without tensor cores to be alike everywhere. `memory_fraction`
is what STREAM-like kernels reach of the bandwidth.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vpipe.errors import PlanError
from vpipe.words.near import did_you_mean

__all__ = ["DEVICES", "LINKS", "Device", "LinkSpec", "find_device", "find_link"]

_GIB = 1 << 30
_USUAL_FRACTION = 0.6


@dataclass(frozen=True)
class Device:
    """An accelerator."""

    name: str
    peak_tflops: Mapping[str, float]
    """Dense matrix products, by the type that is multiplied: `bf16`, `fp16`, `tf32`, `fp32`."""
    memory_bytes: int
    memory_gb_per_s: float
    link: str
    """Between devices of one machine; a name of `LINKS`."""
    host_gb_per_s: float
    """To and from the memory of the host, in one direction."""
    matmul_fraction: Mapping[str, float]
    """Share of the peak that matrix products reach in training, by the same types."""
    memory_fraction: float = 0.9
    """Share of the memory's bandwidth that is reached."""
    kernel_us: float = 4.0
    """The least that any operation takes: starting a kernel."""
    source: str = ""
    host_share: float = 0.0
    """Of the time of a copy to or from the host, what computations beside it lose: 0 where copy engines do it."""


@dataclass(frozen=True)
class LinkSpec:
    """A connection between devices, in one direction."""

    name: str
    latency_us: float
    gb_per_s: float
    """What large messages reach."""
    source: str = ""


LINKS: dict[str, LinkSpec] = {
    link.name: link
    for link in (
        LinkSpec("nvlink2", 10.0, 120.0, "V100: 150 GB/s, of which 0.8 is taken to be reached"),
        LinkSpec("nvlink3", 10.0, 240.0, "A100: 300 GB/s, of which 0.8 is taken to be reached"),
        LinkSpec("nvlink4", 10.0, 360.0, "H100 and H200: 450 GB/s, of which 0.8 is taken to be reached"),
        LinkSpec("pcie3", 10.0, 12.0, "16 lanes: 16 GB/s, of which 0.75 is taken to be reached"),
        LinkSpec("pcie4", 10.0, 24.0, "16 lanes: 32 GB/s, of which 0.75 is taken to be reached"),
        LinkSpec("infiniband-edr", 5.0, 11.0, "100 Gb/s, of which 0.9 is taken to be reached"),
        LinkSpec("infiniband-hdr", 5.0, 22.5, "200 Gb/s, of which 0.9 is taken to be reached"),
        LinkSpec("infiniband-ndr", 5.0, 45.0, "400 Gb/s, of which 0.9 is taken to be reached"),
        LinkSpec("ethernet-10g", 50.0, 1.1, "10 Gb/s, of which 0.9 is taken to be reached, over TCP"),
        LinkSpec("ethernet-25g", 50.0, 2.8, "25 Gb/s, of which 0.9 is taken to be reached, over TCP"),
        LinkSpec("ethernet-100g", 30.0, 11.0, "100 Gb/s, of which 0.9 is taken to be reached"),
    )
}


def _ampere(name: str, memory_gib: int, memory_gb_per_s: float) -> Device:
    peaks = {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}
    reached = {"bf16": 0.68, "fp16": 0.68, "tf32": 0.68, "fp32": 0.67}
    return Device(name, peaks, memory_gib * _GIB, memory_gb_per_s, "nvlink3", 24.0, reached, source="NVIDIA A100, SXM4")


def _hopper(name: str, memory_gib: int, memory_gb_per_s: float, title: str) -> Device:
    peaks = {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}
    reached = {"bf16": 0.5, "fp16": 0.5, "tf32": 0.5, "fp32": 0.67}
    return Device(name, peaks, memory_gib * _GIB, memory_gb_per_s, "nvlink4", 50.0, reached, source=title)


def _volta(name: str, memory_gib: int) -> Device:
    peaks = {"fp16": 125.0, "fp32": 15.7}
    reached = {"fp16": 0.4, "fp32": 0.67}
    return Device(name, peaks, memory_gib * _GIB, 900.0, "nvlink2", 12.0, reached, source="NVIDIA V100, SXM2")


def _other(
    name: str, peaks: dict[str, float], memory_gib: int, memory_gb_per_s: float, link: str, fraction: float, title: str
) -> Device:
    reached = {kind: 0.67 if kind == "fp32" else fraction for kind in peaks}
    host = LINKS[link].gb_per_s
    return Device(name, peaks, memory_gib * _GIB, memory_gb_per_s, link, host, reached, source=title)


_L40S = {"bf16": 362.0, "fp16": 362.0, "tf32": 183.0, "fp32": 91.6}
_RTX3090 = {"bf16": 71.2, "fp16": 71.2, "tf32": 35.6, "fp32": 35.6}
_RTX4090 = {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _volta("v100-16gb", 16),
        _volta("v100-32gb", 32),
        _ampere("a100-40gb", 40, 1555.0),
        _ampere("a100-80gb", 80, 2039.0),
        _hopper("h100-80gb", 80, 3350.0, "NVIDIA H100, SXM5"),
        _hopper("h200-141gb", 141, 4800.0, "NVIDIA H200, SXM5; reached: as H100"),
        _other("l40s-48gb", _L40S, 48, 864.0, "pcie4", 0.54, "NVIDIA L40S"),
        _other("rtx3090-24gb", _RTX3090, 24, 936.0, "pcie4", 0.74, "NVIDIA GeForce RTX 3090"),
        _other("rtx4090-24gb", _RTX4090, 24, 1008.0, "pcie4", 0.74, "NVIDIA GeForce RTX 4090"),
        _other("rtx2080ti-11gb", {"fp16": 53.8, "fp32": 13.4}, 11, 616.0, "pcie3", 0.4, "NVIDIA GeForce RTX 2080 Ti"),
    )
}

_LINK_FORM = re.compile(r"\s*([0-9.]+)\s*us\s*,\s*([0-9.]+)\s*GB/s\s*", re.IGNORECASE)


def find_device(name: str) -> Device:
    """Return a device of the table, or that of a JSON file with the fields of `Device`.

    Raises:
        PlanError: there is none; the text lists those there are. Or the file describes none.
    """
    if name in DEVICES:
        return DEVICES[name]
    if name.endswith(".json"):
        return _read_device(Path(name))
    raise PlanError(
        f"unknown device '{name}'{did_you_mean(name, DEVICES)}; known are {', '.join(DEVICES)}, or give a JSON file "
        f"such as {json.dumps(asdict(DEVICES['a100-80gb']))}"
    )


def find_link(text: str) -> LinkSpec:
    """Return a link of the table, or one written as ``5us,25GB/s``: latency, then bandwidth in one direction.

    Raises:
        PlanError: it is neither; the text lists those there are.
    """
    if text in LINKS:
        return LINKS[text]
    match = _LINK_FORM.fullmatch(text)
    try:
        numbers = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    except ValueError:
        numbers = 0.0, 0.0
    if match is None or not numbers[1]:
        raise PlanError(
            f"unknown link '{text}'{did_you_mean(text, LINKS)}; known are {', '.join(LINKS)}, or write latency and "
            "bandwidth, e.g. 5us,25GB/s"
        )
    return LinkSpec(text.strip(), *numbers)


def _read_device(path: Path) -> Device:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: is no device ({error})") from error
    known = [item.name for item in fields(Device)]
    if not isinstance(content, dict):
        raise PlanError(f"{path}: is not a JSON object with {', '.join(known)}")
    content.setdefault("name", path.stem)
    if unknown := sorted(content.keys() - set(known)):
        raise PlanError(f"{path}: '{unknown[0]}' is not a key of a device{did_you_mean(unknown[0], known)}")
    needed = ("peak_tflops", "memory_bytes", "memory_gb_per_s", "link", "host_gb_per_s")
    if missing := [key for key in needed if key not in content]:
        raise PlanError(f"{path}: has no '{missing[0]}'; a device has {', '.join(known)}")
    fraction = content.get("matmul_fraction", _USUAL_FRACTION)
    if not isinstance(fraction, dict) and isinstance(content["peak_tflops"], dict):
        content["matmul_fraction"] = dict.fromkeys(content["peak_tflops"], fraction)
    if reasons := _bad_values(content):
        raise PlanError(f"{path}: {reasons[0]}")
    return Device(**content)


def _bad_values(content: Mapping[str, Any]) -> list[str]:
    peaks, fractions = content["peak_tflops"], content.get("matmul_fraction")
    if not isinstance(peaks, dict) or not peaks:
        return [f"peak_tflops = {peaks!r} is not an object such as {{'bf16': 312}}"]
    if not isinstance(fractions, dict) or fractions.keys() != peaks.keys():
        return [f"matmul_fraction = {fractions!r} is neither a number nor one for each of {', '.join(peaks)}"]
    shares = {f"matmul_fraction.{name}": value for name, value in fractions.items()}
    shares |= {key: content[key] for key in ("memory_fraction",) if key in content}
    numbers = {f"peak_tflops.{name}": value for name, value in peaks.items()} | shares
    others = ("name", "link", "source", "peak_tflops", "matmul_fraction", "host_share")
    numbers |= {key: value for key, value in content.items() if key not in others}
    reasons = [
        f"{key} = {value!r} is not a number above 0"
        for key, value in numbers.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0
    ]
    share = content.get("host_share", 0.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
        reasons.append(f"host_share = {share!r} is not a finite number of at least 0")
    reasons += [f"{key} = {value} is above 1" for key, value in shares.items() if not reasons and value > 1]
    if content["link"] not in LINKS:
        reasons.append(f"link = {content['link']!r} is not one of {', '.join(LINKS)}")
    return reasons
