"""What a rank really holds: the bytes of all tensors that its operations made and that are still alive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, every tensor that an operation makes is watched, in forwards and in backwards.

    Weights that were there before are not among them. Nothing of the library is asked: not the schedule, which knows
    what should be held, nor the runtime, which counts for itself. What is made under a `label` is counted apart.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._label = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and note what it made."""
        known = {self._identity(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # Views and what is written in place belong to whoever made them: perhaps before this context.
            if isinstance(tensor, Tensor) and self._identity(tensor) not in known:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._storages[storage._cdata] = reference, storage.nbytes(), self._label
        return result

    def _identity(self, tensor: Tensor) -> int:
        identity: int = tensor.untyped_storage()._cdata
        return identity

    @contextmanager
    def label(self, label: str) -> Iterator[None]:
        """Mark all that is made within as of `label`."""
        before, self._label = self._label, label
        yield
        self._label = before

    def count(self, label: str = "", without: Iterable[Tensor | None] = ()) -> int:
        """Count the bytes of `label` that are alive now, less those of `without`."""
        self._storages = {key: item for key, item in self._storages.items() if not item[0].expired()}  # type: ignore[no-untyped-call]
        left_out = {self._identity(tensor) for tensor in without if tensor is not None}
        return sum(nbytes for key, (_, nbytes, own) in self._storages.items() if own == label and key not in left_out)
