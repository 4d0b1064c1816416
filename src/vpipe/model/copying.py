"""Copies of modules and parameters with all that their users put on them.

`copy.deepcopy` gives a parameter's copy its numbers alone: no hooks, no attributes such as marks for the optimizer. It
also leaves out that a module was compiled in place.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vpipe.errors import ModelError

__all__ = ["carry_over", "check_memory", "copy_module", "like_parameter"]


def copy_module(module: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """Return a deep copy of `module` with hooks and attributes of its parameters; `memo` names what is not copied.

    Raises:
        ModelError: it was compiled in place by something else than torch.compile, or cannot be copied.
    """
    memo = {} if memo is None else memo
    copied = _deepcopy(module, memo)
    for part, other in zip(module.modules(), copied.modules(), strict=True):
        if isinstance(part, torch.jit.ScriptModule):
            _own_parameters(part, other, memo)
        for name, original in _tensors(part):
            carry_over(original, getattr(other, name), memo)
        if part._compiled_call_impl is not None:
            other._compiled_call_impl = _compiled_as(part, other)
    return copied


def _deepcopy(module: nn.Module, memo: dict[int, object]) -> nn.Module:
    try:
        with torch.no_grad():
            return copy.deepcopy(module, memo)
    except RuntimeError as error:
        reason = str(error).split(".")[0]
        raise ModelError(
            f"a {type(module).__name__} of the chain cannot be copied: {reason}. It holds a tensor that was computed, "
            "as the old torch.nn.utils.weight_norm does; use torch.nn.utils.parametrizations, or compute it in forward"
        ) from error
    except (TypeError, copy.Error, pickle.PicklingError) as error:
        raise ModelError(
            f"{_odd_part(module)} of the chain cannot be copied: {error}. A pipeline trains copies of modules: keep "
            "such an object out of them, or give their class a __deepcopy__"
        ) from error


def _own_parameters(part: nn.Module, copied: nn.Module, memo: dict[int, object]) -> None:
    """Give the copy of a scripted module parameters: torch makes plain tensors, and of a shared one another."""
    for name, original in part.named_parameters(recurse=False, remove_duplicate=False):
        made = memo.get(id(original))
        if made is None:
            made = memo[id(original)] = like_parameter(getattr(copied, name).detach(), original)
        setattr(copied, name, made)


def _odd_part(module: nn.Module) -> str:
    """Name the attribute of `module` or of a part of it that cannot be copied."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:  # whatever it is, it is what was looked for
                where = f"the attribute '{path}.{name}'" if path else f"the attribute '{name}'"
                return f"{where} of a {type(module).__name__}"
    return f"a {type(module).__name__}"


def _tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from part.named_parameters(recurse=False, remove_duplicate=False)
    yield from part.named_buffers(recurse=False, remove_duplicate=False)
    yield from ((name, item) for name, item in vars(part).items() if isinstance(item, Tensor))


def carry_over(original: Tensor, copied: Tensor, memo: dict[int, object] | None = None) -> None:
    """Give a copy of a parameter or tensor the attributes and hooks of the original, which it does not have yet."""
    before, after = original._backward_hooks, original._post_accumulate_grad_hooks
    if copied is original or not (vars(original) or before or after):
        return
    memo = {} if memo is None else memo
    for name, value in vars(original).items():
        if name not in vars(copied):
            vars(copied)[name] = _mapped(value, memo)
    if (before or after) and not copied._backward_hooks and not copied._post_accumulate_grad_hooks:
        is_trained = copied.requires_grad
        copied.requires_grad_()  # hooks of what is frozen wait until it is trained
        for hook in (before or {}).values():
            copied.register_hook(_mapped(hook, memo))  # type: ignore[no-untyped-call]
        for hook in (after or {}).values():
            copied.register_post_accumulate_grad_hook(_mapped(hook, memo))  # type: ignore[no-untyped-call]
        copied.requires_grad_(is_trained)


def _mapped(value: Any, memo: Mapping[int, object]) -> Any:
    """Return `value` with copied modules and parameters in place of the original ones; all else is the same object.

    Methods of a module become those of its copy; what a function closes over stays.
    """
    if id(value) in memo and isinstance(value, nn.Module | Tensor):
        return memo[id(value)]
    if isinstance(value, MethodType):
        owner = _mapped(value.__self__, memo)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, partial):
        arguments = [_mapped(item, memo) for item in value.args]
        keywords = {name: _mapped(item, memo) for name, item in value.keywords.items()}
        return partial(_mapped(value.func, memo), *arguments, **keywords)
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, memo) for item in value)
    if type(value) is dict:
        return {name: _mapped(item, memo) for name, item in value.items()}
    return value


def like_parameter(data: Tensor, original: nn.Parameter) -> nn.Parameter:
    """Return a parameter of `data` that has the type and the attributes of `original`."""
    kind = type(original)
    made = (
        torch.Tensor._make_subclass(kind, data, original.requires_grad)
        if kind is not nn.Parameter and nn.Parameter in kind.__mro__
        else nn.Parameter(data, original.requires_grad)
    )
    vars(made).update({name: value for name, value in vars(original).items() if name not in vars(made)})
    return made


def _compiled_as(original: nn.Module, copied: nn.Module) -> Callable[..., Any]:
    """Compile `copied` as `original.compile(...)` did it with that one."""
    # Torch keeps the arguments in what made the compiled call.
    compiled = original._compiled_call_impl
    assert compiled is not None
    maker = inspect.getclosurevars(compiled).nonlocals.get("self")
    if not callable(maker):
        raise ModelError(
            f"a {type(original).__name__} was compiled with .compile(), and its copy cannot be compiled in the same "
            "way; give torch.compile(module) instead"
        )
    made: Callable[..., Any] = maker(copied._call_impl)
    return made


def check_memory(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse a trained parameter whose memory is also that of another parameter or buffer: copies would drift apart.

    Raises:
        ModelError: there is one; the text names both.
    """
    ranges = []
    for name, tensor in named:
        if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
            continue
        start = tensor.data_ptr()
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        ranges.append((str(tensor.device), start, start + extent * tensor.element_size(), name, tensor))
    ranges.sort(key=lambda item: item[:3])
    for index, (device, _, end, name, tensor) in enumerate(ranges):
        for other_device, other_start, _, other_name, other in ranges[index + 1 :]:
            if other_device != device or other_start >= end:
                break
            if other is not tensor and (tensor.requires_grad or other.requires_grad) and _overlap(tensor, other):
                one, two = sorted((name, other_name))
                raise ModelError(
                    f"'{one}' and '{two}' share their memory without being one parameter, so their copies would drift "
                    "apart; make them one, which ties them (head.weight = table.weight, without .data), or copy one "
                    "(.clone())"
                )


def _overlap(one: Tensor, two: Tensor) -> bool:
    """Tell whether two tensors on one memory have an element in common, and not only a stretch."""
    if one.element_size() != two.element_size() or (one.is_contiguous() and two.is_contiguous()):
        return True
    size = one.element_size()
    begin = min(one.data_ptr(), two.data_ptr())
    places = [(item.data_ptr() - begin) // size for item in (one, two)]
    extents = [
        place + 1 + sum((n - 1) * step for n, step in zip(item.shape, item.stride(), strict=True))
        for place, item in zip(places, (one, two), strict=True)
    ]
    taken = torch.zeros(max(extents), dtype=torch.bool)
    taken.as_strided(one.shape, one.stride(), places[0]).fill_(True)
    return bool(taken.as_strided(two.shape, two.stride(), places[1]).any())
