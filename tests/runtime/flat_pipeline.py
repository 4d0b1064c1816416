"""A pipeline of options in one row: a case of a test says only what is special about it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vpipe.plan.plan import Plan
from vpipe.runtime.arguments import Memory, as_chain
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Pipeline
from vpipe.runtime.weights.update import Update

_PLAN = {item.name for item in fields(Plan)}
_UPDATE = {item.name for item in fields(Update)}
_MEMORY = {"limit", "watch", "swap_directory"}
_WORLD = {"device", "timeout_seconds", "shared_memory"}


def flat_pipeline(model: Any, loss: Any = None, **options: Any) -> Pipeline:
    """Sort `options` into plan, update, memory and world; what is none of theirs is for the pipeline itself."""
    plan, update, memory, world = (
        {name: options.pop(name) for name in sorted(names & options.keys())}
        for names in (_PLAN, _UPDATE, _MEMORY, _WORLD)
    )
    if (specs := options.pop("field_specs", None)) is not None:
        model, loss = as_chain(model, loss).with_field_specs(specs), None
    if world:
        options["world"] = World.join(**world)
    return Pipeline(model, loss, plan=Plan(**plan), update=Update(**update), memory=Memory(**memory), **options)
