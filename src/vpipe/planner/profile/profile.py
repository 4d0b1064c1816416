"""What was measured: the input of the planner. Plain data, read from and written to JSON with every value checked.

`vpipe profile` measures it (`vpipe.measure.profile`); for machines that one does not have, figures can be computed.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from vpipe.errors import PlanError

__all__ = ["BlockProfile", "LinkProfile", "PairLink", "Profile", "SizeProfile", "read_profile", "write_profile"]

T = TypeVar("T")
FORMAT = 2


@dataclass(frozen=True)
class BlockProfile:
    """One block, for one microbatch. The figures of the last block include the loss.

    Bytes count storages: a block's inputs are counted with it, its outputs with the block after it (or with the
    messages, at a cut). Tensors of the batch are nobody's.
    """

    name: str
    forward_ms: float
    input_grad_ms: float
    """The half of the backward that gives the gradient of the inputs."""
    weight_grad_ms: float
    """The half that gives the gradient of the weights; a full backward takes the sum of both."""
    recompute_ms: float
    """What recomputing the block adds to its backward: about a forward."""
    activation_bytes: int
    """Held from the forward to the backward when the block keeps its activations, its inputs included."""
    input_bytes: int
    """The block's inputs: what is held when the block recomputes."""
    output_bytes: int
    """The message that crosses a cut right after the block, passed-through values included; 0 for the last block."""
    parameter_bytes: int
    """Trainable parameters; their gradients take as much."""
    input_grad_bytes: int = 0
    """Of `activation_bytes`, what the input half of a split backward reads."""
    weight_grad_bytes: int = 0
    """Held between the two halves of a split backward: what the weight half reads, gradients included."""
    workspace_bytes: int = 0
    """Needed for a moment on top, at the peak of the block's forward or backward, when gradients are there."""
    first_workspace_bytes: int = 0
    """The same when they are not, and stay; 0: not known, as when they are there."""
    split_workspace_bytes: int = 0
    """The same in the halves of a split backward; 0: not known, as in a full one."""
    buffer_bytes: int = 0
    """Buffers and frozen parameters: there once, whatever the number of weight versions."""
    optimizer_bytes: int = 0
    """State of the optimizer, master weights included."""
    small_bytes: int = 0
    """Of `activation_bytes`, tensors that stay when the block swaps, because they are too small to be worth moving."""
    step_workspace_bytes: int = 0
    """Needed for a moment on top by an optimizer update."""
    step_ms: float = 0.0
    """The block's share of one optimizer update."""
    version_ms: float = 0.0
    """What it adds to an update that the weights before it are still needed: the next ones go somewhere else."""
    swap_ms: float = 0.0
    """What swapping the block adds to its forward and backward, besides the copies: keeping track of what is saved. Of
    a block that keeps, beside one that swaps, that is done as well."""
    spread: float = 0.0
    """Of the measured times: half the distance between the quartiles, relative to the median."""

    @property
    def backward_ms(self) -> float:
        """Time of a full backward."""
        return self.input_grad_ms + self.weight_grad_ms


@dataclass(frozen=True)
class SizeProfile:
    """All blocks of the chain, in order, for microbatches of one size."""

    microbatch_size: int
    blocks: tuple[BlockProfile, ...]


@dataclass(frozen=True)
class LinkProfile:
    """A link between ranks, or between a rank and its host memory, in one direction."""

    latency_ms: float = 0.0
    bytes_per_ms: float | None = None
    """None: transfers take no time."""

    def transfer_ms(self, num_bytes: float) -> float:
        """Return how long so many bytes occupy the link."""
        return num_bytes / self.bytes_per_ms if self.bytes_per_ms else 0.0


@dataclass(frozen=True)
class PairLink:
    """The link from rank `sender` to rank `receiver`, where it is not like the rest."""

    sender: int
    receiver: int
    link: LinkProfile


@dataclass(frozen=True)
class Profile:
    """What a model costs on a machine, for one or several microbatch sizes (ascending)."""

    fingerprint: str
    """Hash of model, sizes and machine: a profile is used again only where it is equal."""
    machine: Mapping[str, str]
    """What was measured on, and how: for people."""
    sizes: tuple[SizeProfile, ...]
    link: LinkProfile = field(default_factory=LinkProfile)
    """Between any two ranks, but for `links`."""
    links: tuple[PairLink, ...] = ()
    host: LinkProfile | None = None
    """Between a rank and where swapped activations go; None: nothing can be swapped."""
    host_share: float = 0.0
    """Of the time of a copy on that link, what the rank's computations beside it lose: 0 where something else does the
    copying, 1 or more where the cores do that compute."""
    dispatch_ms: float = 0.0
    """What each action takes a rank on top of its computation."""
    rank_speeds: tuple[float, ...] = ()
    """How fast each rank is, relative to what was measured: 2 takes half the time. Empty: all 1."""
    made_of: Mapping[str, str] = field(default_factory=dict)
    """Keys of the run that decide what its blocks cost, with their values; empty where no run was measured."""

    def __post_init__(self) -> None:
        reasons = check_profile(self)
        if reasons:
            raise PlanError("the profile cannot be used: " + "; ".join(reasons))

    @property
    def num_blocks(self) -> int:
        """Count the blocks of the chain."""
        return len(self.sizes[0].blocks)

    @property
    def microbatch_sizes(self) -> tuple[int, ...]:
        """Name the sizes that were measured."""
        return tuple(size.microbatch_size for size in self.sizes)

    def at(self, microbatch_size: int) -> SizeProfile:
        """Return the blocks for a size that was measured, or lies between two: then times and bytes lie between too.

        Raises:
            PlanError: the size is outside of what was measured.
        """
        measured = self.microbatch_sizes
        if not measured[0] <= microbatch_size <= measured[-1]:
            raise PlanError(
                f"the profile is of microbatches of {', '.join(map(str, measured))} samples, which says nothing of "
                f"{microbatch_size}; profile that size too, or change num_microbatches or batch_size"
            )
        upper = bisect_left(measured, microbatch_size)
        if measured[upper] == microbatch_size:
            return self.sizes[upper]
        share = (microbatch_size - measured[upper - 1]) / (measured[upper] - measured[upper - 1])
        pairs = zip(self.sizes[upper - 1].blocks, self.sizes[upper].blocks, strict=True)
        return SizeProfile(microbatch_size, tuple(_between(low, high, share) for low, high in pairs))

    def to_json(self) -> str:
        """Write the profile as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str = "profile") -> Profile:
        """Read a profile that `to_json` wrote; `source` names it in messages.

        Raises:
            PlanError: the text is no such JSON; the message names the key.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{source}: is not JSON (line {error.lineno}: {error.msg})") from error
        version = content.pop("format", None) if isinstance(content, dict) else None
        if version != FORMAT:
            raise PlanError(f"{source}: format is {version!r}, not {FORMAT}; measure again with `vpipe profile`")
        return _read_profile(content, source)


def read_profile(path: str | Path) -> Profile:
    """Read a profile from a file.

    Raises:
        PlanError: the file is missing or holds no profile.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read ({error}); write one with `vpipe profile CONFIG -o {path}`") from error
    return Profile.from_json(text, str(path))


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile to a file."""
    path.write_text(profile.to_json() + "\n", encoding="utf-8")


def check_profile(profile: Profile) -> list[str]:
    """Return why `profile` cannot be used; empty when it can."""
    if not profile.sizes or not all(size.blocks for size in profile.sizes):
        return ["it has no blocks; measure at least one microbatch size"]
    reasons = []
    measured = profile.microbatch_sizes
    if list(measured) != sorted(set(measured)) or measured[0] < 1:
        reasons.append(f"sizes are of {list(measured)} samples; give each once, ascending, from 1 on")
    first = [(block.name, block.parameter_bytes) for block in profile.sizes[0].blocks]
    for size in profile.sizes:
        if [(block.name, block.parameter_bytes) for block in size.blocks] != first:
            reasons.append(f"the blocks for {size.microbatch_size} samples are not those for {measured[0]}")
        for block in size.blocks:
            reasons += _bad_numbers(block, f"block '{block.name}' for {size.microbatch_size} samples")
    for link in (profile.link, *(pair.link for pair in profile.links), *([profile.host] if profile.host else [])):
        reasons += _bad_numbers(link, "a link")
        if link.bytes_per_ms == 0:
            reasons.append("a link has bytes_per_ms 0; use null where transfers take no time")
    reasons += _bad_numbers(profile, "the profile")
    reasons += [
        f"rank_speeds[{rank}] is {speed}; a speed is a finite number above 0"
        for rank, speed in enumerate(profile.rank_speeds)
        if not (math.isfinite(speed) and speed > 0)
    ]
    return reasons


def _bad_numbers(item: object, name: str) -> list[str]:
    values = ((key, value) for key, value in vars(item).items() if isinstance(value, int | float))
    return [
        f"{name} has {key} = {value}; use a finite number of at least 0"
        for key, value in values
        if not math.isfinite(value) or value < 0
    ]


def _between(low: BlockProfile, high: BlockProfile, share: float) -> BlockProfile:
    mixed: dict[str, Any] = {}
    for name, value in vars(low).items():
        if isinstance(value, str):
            mixed[name] = value
        else:
            between = value + (getattr(high, name) - value) * share
            mixed[name] = math.ceil(between) if isinstance(value, int) else between
    return BlockProfile(**mixed)


def _read_profile(content: Any, source: str) -> Profile:
    values = dict(_keys(Profile, content, source))
    values["sizes"] = tuple(
        _read_size(size, f"{source}: sizes[{index}]") for index, size in enumerate(_list(values, "sizes", source))
    )
    values["link"] = _read_link(values.get("link", {}), f"{source}: link")
    values["host"] = None if values.get("host") is None else _read_link(values["host"], f"{source}: host")
    pairs = []
    for index, pair in enumerate(_list(values, "links", source)):
        where = f"{source}: links[{index}]"
        found = dict(_keys(PairLink, pair, where))
        found["link"] = _read_link(found["link"], f"{where}.link")
        pairs.append(_make(PairLink, found, where))
    values["links"] = tuple(pairs)
    values["rank_speeds"] = tuple(_list(values, "rank_speeds", source))
    for speed in values["rank_speeds"]:
        if isinstance(speed, bool) or not isinstance(speed, int | float):
            raise PlanError(f"{source}: rank_speeds has {speed!r}; a speed is a number above 0")
    for key in ("machine", "made_of"):
        found = values.get(key, {})
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise PlanError(f"{source}: {key} = {found!r} is not a JSON object of texts")
    return _make(Profile, values, source)


def _read_size(content: Any, where: str) -> SizeProfile:
    values = dict(_keys(SizeProfile, content, where))
    values["blocks"] = tuple(
        _make(BlockProfile, dict(_keys(BlockProfile, block, f"{where}.blocks[{index}]")), f"{where}.blocks[{index}]")
        for index, block in enumerate(_list(values, "blocks", where))
    )
    return _make(SizeProfile, values, where)


def _read_link(content: Any, where: str) -> LinkProfile:
    return _make(LinkProfile, dict(_keys(LinkProfile, content, where)), where)


def _list(values: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    found = values.get(key, [])
    if not isinstance(found, list):
        raise PlanError(f"{where}: {key} = {found!r} is not a list")
    return found


def _keys(kind: type, content: Any, where: str) -> Mapping[str, Any]:
    """Check that an object has the keys of a dataclass and no others."""
    if not isinstance(content, dict):
        raise PlanError(f"{where}: is not a JSON object")
    known = {item.name for item in fields(kind)}
    needed = {name for name in known if not hasattr(kind, name) and not _has_factory(kind, name)}
    if missing := sorted(needed - content.keys()):
        raise PlanError(f"{where}: has no '{missing[0]}'; measure again with `vpipe profile`")
    if unknown := sorted(content.keys() - known):
        raise PlanError(f"{where}: '{unknown[0]}' is not a known key; known here: {', '.join(sorted(known))}")
    return content


def _has_factory(kind: type, name: str) -> bool:
    return any(item.name == name and callable(item.default_factory) for item in fields(kind))


def _make(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Build a dataclass from what JSON held, with numbers where numbers belong."""
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name not in values or item.type not in _JSON_TYPES:
            continue
        allowed, noun = _JSON_TYPES[str(item.type)]
        value = values[item.name]
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise PlanError(f"{where}: {item.name} = {value!r} is not {noun}")
    return kind(**values)


_JSON_TYPES: dict[object, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "float | None": ((int, float, type(None)), "a number or null"),
}
