"""Forwards alone, over batches of any size: what goes together, and what comes out of it, a loss or outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpipe.errors import ConfigError, DataError, ModelError
from vpipe.model.loss import exact_sum
from vpipe.model.nested import take_apart
from vpipe.runtime.batch import Batch
from vpipe.runtime.comm.world import World
from vpipe.runtime.crossings import Crossings
from vpipe.runtime.executor import Executor, HeldStage
from vpipe.runtime.programs import ProgramBuilder
from vpipe.runtime.result import Outputs

__all__ = ["Engine", "LossSums", "Piece", "Predictions", "join", "pieces_alike", "share_with_all"]

_MOST_TOGETHER = 32
_MOST_WAITING = 4 * _MOST_TOGETHER
"""Pieces of several shapes that may wait for others like them, so that not all held-out data are in memory at once."""


_WHAT = "the outputs of the last stage"


class Engine(NamedTuple):
    """A chain at work: its stages on this rank, what crosses its cuts, and who runs it."""

    held: dict[int, HeldStage]
    crossings: Crossings
    executor: Executor


class Piece(NamedTuple):
    """What is evaluated at once, its number in the whole evaluation, and that of the batch that it is of."""

    number: int
    batch: Batch
    batch_number: int = 0


def pieces_alike(
    batches: Iterable[Batch],
    size: int | None,
    programs: ProgramBuilder,
    memory_limit: int | None,
    *,
    in_order: bool = False,
) -> Iterator[list[Piece]]:
    """Cut each batch from its start into pieces of `size` samples and a short last one; yield those alike together.

    Alike are those whose fields have the same shapes and types, so that the same messages carry them.

    Without a size a batch is cut as one for training, into `num_microbatches`. What was trained on before has no say:
    how large a piece is decides which kernels compute it, and so the bits of its loss. Nothing comes back from ranks
    behind that would hold up one that is ahead, so whatever is together may be under way at once: with a limit no more
    than in training, for which a plan has left room. With `in_order` a piece waits for
    others no longer than until twice as many have come.

    Raises:
        ConfigError, DataError: the size is below 1; there are no batches.
    """
    if size is not None and size < 1:
        raise ConfigError(
            f"microbatch_size is {size}; give a number of samples above 0, or None: batches are cut as for training"
        )
    most = _MOST_TOGETHER if memory_limit is None else programs.window
    most_waiting = most if in_order else _MOST_WAITING
    waiting: dict[object, list[Piece]] = {}
    numbers = count()
    for index, batch in enumerate(batches):
        for part in _cut(batch, size or -(-batch.num_samples // programs.num_microbatches)):
            form = part.num_samples, part.form()
            alike = waiting.setdefault(form, [])
            alike.append(Piece(next(numbers), part, index))
            if len(alike) >= most:
                yield waiting.pop(form)
            elif sum(map(len, waiting.values())) >= most_waiting:
                yield waiting.pop(next(iter(waiting)))  # what has waited longest
    if not next(numbers):
        raise DataError("there are no batches to evaluate; an iterator that was read to its end has none left")
    yield from waiting.values()


def _cut(batch: Batch, size: int) -> Iterator[Batch]:
    if batch.num_samples <= size:
        yield batch
        return
    for start in range(0, batch.num_samples, size):
        stop = min(start + size, batch.num_samples)
        yield Batch(batch.rows(slice(start, stop)), stop - start, batch.whole)


class LossSums:
    """Adds up the parts of the loss, and what they have to be divided by; on the rank of the last stage.

    So it does with metrics, which are no part of the loss.
    """

    def __init__(self, parts: Sequence[str], metrics: Sequence[str] = ()) -> None:
        self._parts, self._metrics = tuple(parts), tuple(metrics)
        self._losses: dict[str, list[float]] = {name: [] for name in (*parts, *metrics)}
        self._counts: dict[str, list[float]] = {name: [] for name in self._losses}

    def take(self, losses: dict[int, dict[str, Tensor]], counts: dict[int, dict[str, float]]) -> None:
        """Move what there is of microbatches here; their order makes no difference."""
        for serial in list(losses):
            parts, own = losses.pop(serial), counts.pop(serial)
            own |= {name: parts[name][1].item() for name in self._metrics}
            for name, values in self._losses.items():
                values.append(parts[name].item() if name in self._parts else parts[name][0].item())
                self._counts[name].append(own[name])

    def means(self, source: int, world: World) -> dict[str, float]:
        """Return the loss, its parts and the metrics as rank `source` has them, on every rank of `world`; collective.

        What there are no targets of is NaN.
        """
        totals = torch.tensor(
            [exact_sum(values) for values in (*self._losses.values(), *self._counts.values())], dtype=torch.float64
        )
        world.broadcast(totals, source, "the held-out loss")
        values, num_sums = totals.tolist(), len(self._losses)
        means = [
            total / targets if targets else math.nan
            for total, targets in zip(values[:num_sums], values[num_sums:], strict=True)
        ]
        return {"loss": exact_sum(means[: len(self._parts)]), **dict(zip(self._losses, means, strict=True))}


class Predictions:
    """Puts the outputs of pieces together again, batch by batch, in the order of batches; None on ranks without any.

    `batches` are to be cut by `pieces_alike`.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._given = batches
        self._num_done = 0
        self._samples_left: dict[int, int] = {}
        self._parts: dict[int, dict[int, dict[str, Any]]] = {}

    def pieces(self, size: int | None, programs: ProgramBuilder, memory_limit: int | None) -> Iterator[list[Piece]]:
        """Cut the batches into pieces and yield those alike together, none long after those before it."""
        given = self._batches()
        # Of nothing there are no predictions, as in a loop; a mean over it there cannot be.
        if (first := next(given, None)) is not None:
            every = chain([first], given)
            yield from pieces_alike(every, size, programs, memory_limit, in_order=True)

    def _batches(self) -> Iterator[Batch]:
        for index, batch in enumerate(self._given):
            self._samples_left[index] = batch.num_samples
            yield batch

    def take(self, pieces: Sequence[Piece], outputs: dict[int, dict[str, Any]]) -> Iterator[Outputs | None]:
        """Move the outputs of pieces that were run together here; yield batches that are complete.

        Raises:
            ModelError: outputs cannot be put together.
        """
        for serial, piece in enumerate(pieces):
            self._samples_left[piece.batch_number] -= piece.batch.num_samples
            if serial in outputs:
                self._parts.setdefault(piece.batch_number, {})[piece.number] = outputs.pop(serial)
        while self._samples_left.get(self._num_done) == 0:
            del self._samples_left[self._num_done]
            parts = self._parts.pop(self._num_done, {})
            self._num_done += 1
            yield join([parts[number] for number in sorted(parts)])


def join(parts: Sequence[dict[str, Any]]) -> Outputs | None:
    """Return the outputs of a batch, which was run in `parts` one after another; None where there are none.

    Raises:
        ModelError: they have no rows, or rows of several shapes.
    """
    if not parts:
        return None
    values = {name: _join_values(name, [part[name] for part in parts]) for name in parts[0]}
    return values if len(values) > 1 else next(iter(values.values()))


def _join_values(name: str, values: Sequence[Any]) -> Any:
    (first, nest), *others = (take_apart(name, value) for value in values)
    if any(other != nest for _, other in others):
        raise ModelError(
            f"the last block writes '{name}' as {nest or 'a tensor'} for some microbatches, and otherwise for "
            "others; let it write one form, or run each batch as one piece (microbatch_size of predict, "
            "num_microbatches of the plan)"
        )
    joined = {part: _join_rows(part, [first[part], *(other[part] for other, _ in others)]) for part in first}
    return joined[name] if nest is None else nest.put_together(joined)


def _join_rows(name: str, rows: Sequence[Tensor]) -> Tensor:
    if len(rows) == 1:
        return rows[0]
    shapes = list(dict.fromkeys(tuple(item.shape) for item in rows))
    if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
        raise ModelError(
            f"the last block writes '{name}' in the shapes {' and '.join(map(str, shapes))}, which are no rows of one "
            "batch; let it write a row of one shape for each sample, or run each batch as one piece (microbatch_size "
            "of predict, num_microbatches of the plan)"
        )
    return torch.cat(list(rows))


def share_with_all(outputs: Outputs | None, source: int, world: World) -> Outputs:
    """Return what rank `source` has on every rank of `world`, and on its device; collective."""
    own, nest = ({}, None) if world.rank != source else take_apart("", outputs)
    mine = {name: (item.shape, item.dtype) for name, item in own.items()}, nest
    forms, nest = world.gather(mine, _WHAT)[source]
    found = {}
    for name, (shape, dtype) in forms.items():
        sent = own[name].cpu().contiguous() if world.rank == source else torch.empty(shape, dtype=dtype)
        if sent.numel():
            world.broadcast(sent.flatten().view(torch.uint8), source, _WHAT)
        found[name] = own[name] if world.rank == source else sent.to(world.device)
    return found[""] if nest is None else nest.put_together(found)
