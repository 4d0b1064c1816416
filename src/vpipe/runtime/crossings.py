"""What crosses each cut, inferred once per shape of a microbatch and agreed on by all ranks."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from vpipe.data.batches import microbatch_rows
from vpipe.errors import DataError
from vpipe.model.chain import Chain, Crossing
from vpipe.plan.partition import Partition
from vpipe.runtime.assembly import crossing_specs
from vpipe.runtime.batch import Batch, field_tensors
from vpipe.runtime.comm.agreement import agree, agree_on_batch
from vpipe.runtime.comm.world import World

__all__ = ["Crossings"]


class Crossings:
    """Remembers what crosses the cut in front of each stage, by the shapes of a microbatch's fields.

    Where the chain does not describe its fields a batch does, which must have all of them then.
    """

    def __init__(self, chain: Chain, partition: Partition, world: World) -> None:
        self._chain = chain
        self._partition = partition
        self._world = world
        self._known: dict[object, dict[int, Crossing]] = {}
        self._inferred = chain
        self.frozen: frozenset[str] = frozenset()
        """Weights that are not trained now, besides those that never are."""

    def assume_frozen(self, names: Collection[str]) -> None:
        """Infer anew, with the weights of these names frozen and all others as the model has them."""
        self.frozen = frozenset(names)
        self._known.clear()
        self._inferred = self._chain.with_frozen(names)

    def agree(self, batch: Batch, num_microbatches: int, *, training: bool, compare: bool) -> None:
        """Find out, together with all ranks, what crosses for the microbatches of a batch; collective as `of` is."""
        rows = microbatch_rows(batch.num_samples, num_microbatches)
        for size in sorted({part.stop - part.start for part in rows} - {0}):
            self.of(batch, size, training=training, compare=compare)
            compare = False

    def of(
        self, batch: Batch, num_samples: int, *, training: bool, compare: bool = False, together: bool = True
    ) -> dict[int, Crossing]:
        """Return what crosses for microbatches of `num_samples` of such a batch.

        Collective when the shape is new, or where ranks are to `compare` their batches anyway; not where they meet the
        batch at different times instead of `together`: messages tell then whether all have inferred the same.

        Raises:
            ConfigError: ranks do not infer the same, or were given different batches.
            DataError, ModelError: a field is missing, has other rows than the chain says, or a block cannot run on such
                fields.
        """
        _check_described(self._chain, batch)
        described = {} if self._chain.field_specs is not None else batch.fields
        shapes = training, num_samples, batch.form() if described else ()
        if shapes not in self._known:
            fields = field_tensors(self._chain, batch, num_samples)
            if described and num_samples < batch.num_samples:
                _refuse_cut_of_whole(self._chain, batch, num_samples)
            rows = Batch(described, batch.num_samples, batch.whole).rows(slice(num_samples)) if described else {}
            crossing = crossing_specs(
                self._inferred, self._partition, fields | rows, self._world.device, training=training
            )
            if together:
                agree({"values between stages": crossing, "form of the batch": shapes[2]}, self._world)
            self._known[shapes] = crossing
            compare = together
        if compare:
            agree_on_batch(batch.tensors(), self._world)
        return self._known[shapes]


def _check_described(chain: Chain, batch: Batch) -> None:
    """Refuse rows of another shape than the chain says that they have: what crosses the cuts follows from that."""
    for name, spec in (chain.field_specs or {}).items():
        tensor = batch.fields.get(name)
        if tensor is not None and not isinstance(tensor, Tensor):
            raise DataError(
                f"the field '{name}' is of type {type(tensor).__name__}, which was described (field_specs, or "
                "fields of a data source) as a tensor; give a tensor, or all fields on every rank to a chain without "
                "field_specs"
            )
        if tensor is not None and name not in batch.whole and tuple(tensor.shape[1:]) != tuple(spec.shape_per_sample):
            raise DataError(
                f"a batch has rows of shape {tuple(tensor.shape[1:])} in the field '{name}', which was described "
                f"(field_specs, or fields of a data source) as {tuple(spec.shape_per_sample)}; pad them to that, or "
                "give all fields on every rank to a chain without field_specs"
            )


def _refuse_cut_of_whole(chain: Chain, batch: Batch, num_samples: int) -> None:
    """Refuse to cut a field that only happens to have as many rows as the batch has samples, where shapes betray it.

    With another number of samples the blocks do not fit together then, but do if they get this field whole.
    """
    read = dict.fromkeys(name for block in chain.blocks for name in block.inputs)
    fields = [name for name in read if name in batch.fields and name not in batch.whole]
    if len(fields) < 2:
        return
    other = batch.num_samples + num_samples + 1
    if _runs(chain, batch, other, batch.whole):
        return
    for name in fields:
        if _runs(chain, batch, other, batch.whole | {name}):
            shape = tuple(batch.fields[name].shape)
            raise DataError(
                f"the field '{name}' of shape {shape} would be cut into rows, one per sample, and the model only works "
                "with other numbers of samples when every microbatch gets it whole; declare it: "
                f"vpipe.Chain(..., whole_fields=('{name}',))"
            )


def _runs(chain: Chain, batch: Batch, num_samples: int, whole: frozenset[str]) -> bool:
    return chain.runs_on_meta(field_tensors(chain, Batch(batch.fields, batch.num_samples, whole), num_samples))
