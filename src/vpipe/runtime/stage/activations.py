"""What the forward of one microbatch through one stage leaves for its backward, as the policies of the blocks say."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vpipe.runtime.memory.storages import place_of, sizes_of
from vpipe.runtime.memory.swap import Kept, Parcel, Swapped, take
from vpipe.runtime.stage.findings import Findings, are_hooks_refused, telling_refused_hooks
from vpipe.runtime.stage.recompute import Recomputation

__all__ = ["Activations"]


class Activations:
    """Runs the blocks of one forward, and does later what has to be done about their activations.

    `swaps` are the blocks whose activations can be moved; `shared` are tensors that live anyway, such as fields of the
    batch: they are neither moved nor counted. With `is_watched` all memory is noted, for the ledger.
    """

    def __init__(
        self,
        swaps: Container[int],
        shared: Iterable[Tensor] = (),
        *,
        is_watched: bool = False,
        findings: Findings | None = None,
    ) -> None:
        self._findings = Findings() if findings is None else findings
        self._swaps = swaps
        self._swapped = Swapped() if swaps else None
        self._recomputations: list[Recomputation] = []
        self._notes = is_watched or self._swapped is not None
        self._noted: dict[int, int] = {}
        self._modules: list[nn.Module] = []
        self._fields = {place_of(tensor) for tensor in shared} if self._notes else set()
        self.shared = set(self._fields)
        """Where memory lies that lives anyway: fields of the batch, and weights and buffers."""
        self._around_loss: Callable[..., Any] = _plainly

    @property
    def moves(self) -> bool:
        """Tell whether any of it may be moved."""
        return self._swapped is not None

    def around(
        self, block: int, name: str, module: nn.Module, call: Callable[..., Any], *, recomputes: bool
    ) -> Callable[..., Any]:
        """Return what to call instead of `call`, which runs the module of a block."""
        if self._notes:
            self._modules.append(module)
            self.shared.update(_places(module))
        if recomputes:
            recomputation = Recomputation(name, module, call, self._findings.state_of(block, name))
            self._recomputations.append(recomputation)
            self._around_loss = recomputation.go_on
            return recomputation.run
        if self._swapped is not None and block in self._swaps:
            self._around_loss = self._swapped.run
            return partial(self._swapping, name, call)
        if not self._notes or block in self._findings.unseen:
            self._around_loss = _plainly
            return call
        self._around_loss = self._noting_loss
        return partial(self._noting_block, block, call)

    def around_loss(self, call: Callable[[Any], Any], written: Any) -> Any:
        """Run the loss on what the last block returned, by that block's policy."""
        return self._around_loss(call, written)

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Say what else is held until the backward."""
        if self._notes:
            self._noted.update(sizes_of(tensors, self.shared))

    def forget_needless(self) -> None:
        """Drop the inputs of blocks that have no backward."""
        self._recomputations = [item for item in self._recomputations if item.is_needed]

    def recompute(self) -> None:
        """Compute again all that was left out."""
        for item in self._recomputations:
            item.fill()
        if self._notes:
            # Weights that were moved to host memory meanwhile are somewhere else now.
            self.shared = self._fields.union(*map(_places, self._modules))

    def pack_up(self) -> list[Parcel]:
        """Return what can be moved to host memory now."""
        if self._swapped is None:
            return []
        staying = self.shared | self._noted.keys() | sizes_of(self._recomputed(), ()).keys()
        return self._swapped.pack_up(staying)

    def parcels(self) -> list[Parcel]:
        """Return what was packed up, in the order in which the backward will want it."""
        return [] if self._swapped is None else self._swapped.parcels()

    def held(self) -> dict[int, int]:
        """Return place and bytes of every storage that is held on the device, but for parcels."""
        found = self._noted | sizes_of(self._recomputed(), self.shared)
        return found if self._swapped is None else found | sizes_of(self._swapped.tensors(), self.shared)

    def _recomputed(self) -> Iterable[Tensor]:
        for item in self._recomputations:
            yield from item.tensors()

    def _swapping(self, name: str, call: Callable[..., Any], *inputs: Any) -> Any:
        assert self._swapped is not None
        with telling_refused_hooks(name, "moved to host memory"):
            return self._swapped.run(call, *inputs)

    def _noting_block(self, block: int, call: Callable[..., Any], *inputs: Any) -> Any:
        try:
            return self._noting(call, *inputs)
        except RuntimeError as error:
            if are_hooks_refused(error):
                self._findings.add(self._findings.unseen, block)
            raise

    def _noting_loss(self, call: Callable[..., Any], *inputs: Any) -> Any:
        try:
            return self._noting(call, *inputs)
        except RuntimeError as error:
            if are_hooks_refused(error):
                return call(*inputs)
            raise

    def _noting(self, call: Callable[..., Any], *inputs: Any) -> Any:
        with saved_tensors_hooks(self._note, take):
            return call(*inputs)

    def _note(self, tensor: Tensor) -> Kept:
        self._noted.update(sizes_of((tensor,), self.shared))
        return Kept(tensor)


def _places(module: nn.Module) -> Iterator[int]:
    return (place_of(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _plainly(call: Callable[..., Any], *inputs: Any) -> Any:
    return call(*inputs)
