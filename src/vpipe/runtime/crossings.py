"""What crosses each cut, inferred once per shape of a microbatch and agreed on by all ranks."""

from __future__ import annotations

from vpipe.model.chain import Chain, ValueSpec
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
        self._known: dict[object, dict[int, tuple[ValueSpec, ...]]] = {}

    def of(
        self, batch: Batch, num_samples: int, *, training: bool, compare: bool = False
    ) -> dict[int, tuple[ValueSpec, ...]]:
        """Return what crosses for microbatches of `num_samples` of such a batch.

        Collective when the shape is new, or where ranks are to `compare` their batches anyway.

        Raises:
            ConfigError: ranks do not infer the same, or were given different batches.
            DataError, ModelError: a field is missing, or a block cannot run on such fields.
        """
        described = {} if self._chain.field_specs is not None else batch.fields
        given = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in described.items())
        shapes = training, num_samples, given
        if shapes not in self._known:
            fields = field_tensors(self._chain, batch, num_samples)
            crossing = crossing_specs(self._chain, self._partition, fields, training=training)
            agree({"values between stages": crossing}, self._world)
            self._known[shapes] = crossing
            compare = True
        if compare:
            agree_on_batch(batch.fields, self._world)
        return self._known[shapes]
