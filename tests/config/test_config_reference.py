"""Every key is documented, and the reference shows it."""

from __future__ import annotations

import pytest

from vpipe.config import RunConfig
from vpipe.config.original.flat import DIRECT, FLAT_KEYS
from vpipe.config.problems import native_keys, sections
from vpipe.config.reference import reference_lines


def test_every_field_has_a_docstring() -> None:
    kinds = [RunConfig, *sections().values()]
    bare = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name, field in kind.model_fields.items()
        if not field.description
    ]
    assert bare == []  # fmt: skip


def test_reference_shows_every_key_and_its_default() -> None:
    text = "\n".join(reference_lines())
    for key in native_keys():
        assert f"  {key}: " in text
    for key in FLAT_KEYS:
        assert f"\n  {key}: " in text
    assert "  optimizer.betas: [0.9, 0.999]\n" in text
    assert "(one of 'adam', 'adamw', 'sgd', 'lamb')" in text


def test_reference_is_wrapped() -> None:
    assert max(map(len, reference_lines(width=60)[:-40])) <= 60


@pytest.mark.parametrize("key", DIRECT)
def test_flat_keys_point_to_native_ones(key: str) -> None:
    assert DIRECT[key] in native_keys()
