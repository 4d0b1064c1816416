"""What a model would cost on devices that one does not have: a profile out of counts and data sheets.

Every operation of a block takes the longest of three times: its floating-point operations at the share of the peak that
matrix products reach, its bytes at the share of the bandwidth that is reached, and the start of a kernel (the roofline
model of Williams, Waterman and Patterson, CACM 2009, operation by operation). Nothing overlaps within a device.

Several devices may make up a rank by splitting every block among them (tensor parallelism with its sequence-parallel
form, Korthikanti et al. 2022): each then has that share of operations and bytes, and after each block's forward, as
after its backward, they exchange its result by a ring over the link inside the machine. All bytes are one device's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vpipe.errors import PlanError
from vpipe.planner.estimate.devices import LINKS, Device, LinkSpec
from vpipe.planner.profile.profile import BlockProfile, LinkProfile, Profile, SizeProfile

__all__ = ["BlockWork", "Machine", "ModelWork", "Operation", "Precision", "analytic_profile", "operation_ms"]


@dataclass(frozen=True)
class Operation:
    """One kernel, so many times over."""

    name: str
    flops: int
    num_bytes: int
    """Read and written."""
    count: int = 1


@dataclass(frozen=True)
class BlockWork:
    """What one block does and holds for one microbatch, counted; bytes as `BlockProfile` defines them."""

    name: str
    forward: tuple[Operation, ...]
    input_grad: tuple[Operation, ...]
    weight_grad: tuple[Operation, ...]
    num_parameters: int
    """Trainable numbers."""
    activation_bytes: int
    input_bytes: int
    output_bytes: int
    input_grad_bytes: int
    weight_grad_bytes: int
    workspace_bytes: int
    buffer_bytes: int
    tied_parameters: int = 0
    """Of the parameters, those that are another block's, too: their gradients are exchanged before an update."""

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of matrix products in the forward."""
        return sum(item.flops * item.count for item in self.forward)


@dataclass(frozen=True)
class ModelWork:
    """All blocks of a chain, in order, by microbatch size (ascending)."""

    name: str
    num_parameters: int
    """Trainable numbers, tied ones counted once."""
    tokens_per_sample: int
    """0 for models without tokens."""
    sizes: Mapping[int, tuple[BlockWork, ...]]
    num_kinds: int
    """Blocks that are not like an earlier one."""
    attention: str = "flash"
    """`flash`: one kernel that holds no scores; `plain`: scores are held."""
    masked_share: float | None = None
    """Of the tokens, those that are masked and predicted; None where a model has no such thing."""


@dataclass(frozen=True)
class Precision:
    """Types, and bytes of each parameter; the defaults are those of Rajbhandari et al. (ZeRO, 2020) for mixed types."""

    compute: str = "bf16"
    """What is multiplied: a key of `Device.peak_tflops`. Activations and messages have this type."""
    weight_bytes: int = 2
    gradient_bytes: int = 2
    optimizer_bytes: int = 12
    """Master weights and both moments of Adam in fp32."""

    @property
    def activation_type(self) -> str:
        """Type of activations: `tf32` multiplies fp32 numbers."""
        return "fp32" if self.compute == "tf32" else self.compute

    @property
    def total_bytes(self) -> int:
        """Bytes of a parameter with everything that belongs to it."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Machine:
    """Ranks of one or several equal devices, and what connects them."""

    device: Device
    link: LinkSpec
    """Between ranks."""
    precision: Precision
    devices_per_rank: int = 1
    swaps: bool = True
    """Whether activations may go to the memory of the host."""

    def __post_init__(self) -> None:
        peaks = self.device.peak_tflops
        if self.precision.compute not in peaks:
            raise PlanError(
                f"{self.device.name} has no peak for {self.precision.compute}; use one of {', '.join(peaks)}"
            )
        if self.precision.gradient_bytes < self.precision.weight_bytes:
            raise PlanError(
                f"gradients of {self.precision.gradient_bytes} bytes with weights of {self.precision.weight_bytes}: "
                "gradients take at least as much as the weights"
            )

    @property
    def flops_per_ms(self) -> float:
        """Matrix products of all devices of a rank, as far as they are reached."""
        return self.peak_flops_per_ms * self.device.matmul_fraction[self.precision.compute]

    @property
    def peak_flops_per_ms(self) -> float:
        """Matrix products of all devices of a rank by the data sheet."""
        return self.device.peak_tflops[self.precision.compute] * 1e9 * self.devices_per_rank

    @property
    def bytes_per_ms(self) -> float:
        """What the memories of all devices of a rank deliver together."""
        return self.device.memory_gb_per_s * 1e6 * self.device.memory_fraction * self.devices_per_rank

    def exchange_ms(self, num_bytes: float) -> float:
        """Return the time in which a rank's devices sum up so many bytes by a ring."""
        count = self.devices_per_rank
        if count == 1 or not num_bytes:
            return 0.0
        link = LINKS[self.device.link]
        return 2 * (count - 1) * (num_bytes / count / (link.gb_per_s * 1e6) + link.latency_us / 1e3)


def operation_ms(operation: Operation, machine: Machine) -> float:
    """Return the time of an operation, all its repeats included."""
    once = max(
        operation.flops / machine.flops_per_ms,
        operation.num_bytes / machine.bytes_per_ms,
        machine.device.kernel_us / 1e3,
    )
    return once * operation.count


def analytic_profile(model: ModelWork, machine: Machine) -> Profile:
    """Return the profile of a model on a machine."""
    sizes = tuple(
        SizeProfile(size, tuple(_block(work, machine) for work in works)) for size, works in model.sizes.items()
    )
    link, device = machine.link, machine.device
    described = {
        "model": model.name,
        "device": device.name,
        "devices_per_rank": str(machine.devices_per_rank),
        "link": link.name,
        "computed": "from counts and data sheets (vpipe estimate), not measured",
    }
    text = repr((model, machine))
    return Profile(
        hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        described,
        sizes,
        link=LinkProfile(link.latency_us / 1e3, link.gb_per_s * 1e6),
        host=LinkProfile(0.0, device.host_gb_per_s * 1e6) if machine.swaps else None,
        host_share=device.host_share,
    )


def _block(work: BlockWork, machine: Machine) -> BlockProfile:
    precision, share = machine.precision, machine.devices_per_rank
    forward = _sum_ms(work.forward, machine) + machine.exchange_ms(work.output_bytes)
    parameters = work.num_parameters

    def each(num_bytes: float) -> int:
        return math.ceil(num_bytes / share)

    return BlockProfile(
        name=work.name,
        forward_ms=forward,
        input_grad_ms=_sum_ms(work.input_grad, machine) + machine.exchange_ms(work.input_bytes),
        weight_grad_ms=_sum_ms(work.weight_grad, machine),
        recompute_ms=forward,
        activation_bytes=each(work.activation_bytes),
        input_bytes=each(work.input_bytes),
        output_bytes=each(work.output_bytes),
        parameter_bytes=each(parameters * precision.weight_bytes),
        input_grad_bytes=each(work.input_grad_bytes),
        weight_grad_bytes=each(work.weight_grad_bytes),
        workspace_bytes=each(work.workspace_bytes),
        buffer_bytes=each(work.buffer_bytes),
        optimizer_bytes=each(
            parameters * (precision.optimizer_bytes + precision.gradient_bytes - precision.weight_bytes)
        ),
        step_ms=_step_ms(work, machine),
    )


def _sum_ms(operations: Sequence[Operation], machine: Machine) -> float:
    return math.fsum(operation_ms(operation, machine) for operation in operations)


def _step_ms(work: BlockWork, machine: Machine) -> float:
    """Return the time of an update: state read and written, gradients read, weights written; tied gradients sent."""
    precision = machine.precision
    moved = 2 * precision.optimizer_bytes + precision.gradient_bytes + precision.weight_bytes
    own = work.num_parameters * moved / machine.bytes_per_ms
    sent = work.tied_parameters * precision.gradient_bytes / machine.devices_per_rank
    return own + (sent / (machine.link.gb_per_s * 1e6) if sent else 0.0)
