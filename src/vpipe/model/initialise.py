"""Give modules that were made on the meta device their memory and initial weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vpipe.errors import ModelError
from vpipe.model.copying import carry_over

__all__ = ["initialise_meta"]


def initialise_meta(name: str, module: nn.Module) -> nn.Module:
    """Move the parts of `module` that live on the meta device to the CPU and let each draw its own initial weights.

    Parts that already have memory keep their values, and parameters that are one stay one. `name` is the block's.

    Raises:
        ModelError: a part on the meta device cannot initialise itself.
    """
    # Children before parents: a parent may overwrite what its children drew, as constructors do.
    parts = [(path, part) for path, part in reversed(list(module.named_modules())) if _has_meta(part)]
    resets = [_find_reset(name, path, part) for path, part in parts]
    places = _places_of_shared_parameters(module)
    for _, part in parts:
        before = list(part.named_parameters(recurse=False, remove_duplicate=False))
        part.to_empty(device="cpu", recurse=False)
        for local, original in before:
            carry_over(original, getattr(part, local))
    # Emptying gives every place a tensor of its own.
    for first, *others in places:
        shared = module.get_parameter(first)
        for other in others:
            path, _, attribute = other.rpartition(".")
            setattr(module.get_submodule(path), attribute, shared)
    for reset in resets:
        reset()
    return module


def _direct_tensors(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(recurse=False), *part.buffers(recurse=False)]


def _has_meta(part: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in _direct_tensors(part))


def _find_reset(name: str, path: str, part: nn.Module) -> Callable[[], None]:
    # torch.nn.MultiheadAttention spells it with an underscore.
    reset: Callable[[], None] | None = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
    if not callable(reset):
        where = f"its part '{path}' ({type(part).__name__})" if path else f"its module ({type(part).__name__})"
        raise ModelError(
            f"block '{name}' was made on the meta device and {where} has no reset_parameters(); "
            "give it one, or build the block from a factory: Block(name, build, inputs, outputs)"
        )
    return reset


def _places_of_shared_parameters(module: nn.Module) -> list[list[str]]:
    places: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return [names for names in places.values() if len(names) > 1]
