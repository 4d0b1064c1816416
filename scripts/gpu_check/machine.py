"""What the machine has: torch, CUDA, driver, devices. And that each device computes at all."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from gpu_check.notes import CheckFailed, Notes

__all__ = ["environment"]

_ROOT = Path(__file__).resolve().parents[2]
_VARIABLES = ("CUDA", "NVIDIA_VISIBLE", "NCCL", "TORCH", "PYTORCH", "GLOO", "VPIPE", "OMP", "MKL", "KINETO")
_QUERY = "index,name,uuid,driver_version,memory.total,compute_mode,mig.mode.current"


def environment(notes: Notes) -> None:
    """Tell what there is; a device that does not compute is a problem."""
    notes.number(**_system(), nvidia_smi=_nvidia_smi(), missing=_missing())
    import torch

    notes.number(**_torch())
    if missing := notes.content["numbers"]["missing"]:
        notes.problem(f"this Python lacks {', '.join(missing)}; install them, or leave PYTHON out")
    devices = [_describe(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    notes.number(devices=devices)
    if notes.on_gpu:
        for device in devices:
            _try(device["index"], notes)
        pairs = [(one, other) for one in range(len(devices)) for other in range(len(devices)) if one != other]
        notes.number(peer_access={f"{pair}": torch.cuda.can_device_access_peer(*pair) for pair in pairs})
    notes.say(_in_words(notes.content["numbers"]))


def _system() -> dict[str, Any]:
    memory = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()}",
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shared_memory_bytes": memory.f_frsize * memory.f_blocks if memory else None,
        "commit": _output("git", "-C", str(_ROOT), "rev-parse", "HEAD"),
        "variables": {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
    }


def _torch() -> dict[str, Any]:
    import torch

    import vpipe

    has_cuda, has_nccl = torch.cuda.is_available(), torch.distributed.is_nccl_available()
    nccl = torch.cuda.nccl.version() if has_cuda and has_nccl else None  # type: ignore[no-untyped-call]
    return {
        "vpipe": vpipe.__version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if has_cuda else None,  # type: ignore[no-untyped-call]
        "nccl": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else nccl,
    }


def _missing() -> list[str]:
    """Name the packages that VPipe needs and this interpreter does not have."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[><=~!\[; ]", item)[0] for item in project["dependencies"]]
    known = {str(item.metadata["Name"]).lower().replace("_", "-") for item in importlib.metadata.distributions()}
    return [name for name in names if name.lower().replace("_", "-") not in known]


def _nvidia_smi() -> list[str]:
    text = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")
    return text.splitlines() if text else []


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _describe(index: int) -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": found.name,
        "uuid": str(found.uuid),
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "num_multiprocessors": found.multi_processor_count,
    }


def _try(index: int, notes: Notes) -> None:
    """Let a device multiply, and copy to pinned memory on a stream of its own."""
    import torch

    device = torch.device("cuda", index)
    try:
        value = torch.arange(64 * 64, dtype=torch.float32).view(64, 64) / 4096
        there, stream = value.to(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        product = there @ there
        back = torch.empty(64, 64, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            back.copy_(product, non_blocking=True)
        stream.synchronize()
        if not torch.allclose(back, value @ value, rtol=1e-2):
            raise CheckFailed("a product of matrices is wrong")
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        notes.problem(f"cuda:{index} does not compute: {type(error).__name__}: {first}")


def _in_words(numbers: dict[str, Any]) -> str:
    words = [f"torch {numbers['torch']}"]
    for name, key in (("CUDA", "torch_cuda"), ("NCCL", "nccl")):
        words += [f"{name} {numbers[key]}"] if numbers[key] else []
    words += [f"driver {line.split(', ')[3]}" for line in numbers["nvidia_smi"][:1]]
    names = [device["name"] for device in numbers["devices"]]
    kinds = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ", ".join([*words, *(kinds or ["no CUDA device"]), f"{numbers['num_cores']} cores"])
