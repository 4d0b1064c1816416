"""Profiles: written, read back, and refused where they are wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_toys import block, profile_of, uniform_profile

from vpipe.errors import PlanError
from vpipe.planner.profile.profile import LinkProfile, PairLink, Profile, SizeProfile, read_profile, write_profile


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    profile = profile_of(
        [block(forward_ms=1.25, spread=0.01), block()],
        host=LinkProfile(0.1, 5e6),
        links=(PairLink(0, 1, LinkProfile(0.5, None)),),
        rank_speeds=(1.0, 0.5),
        dispatch_ms=0.2,
    )
    write_profile(profile, tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == profile


def test_defaults_may_be_left_out() -> None:
    profile = uniform_profile(2)
    content = json.loads(profile.to_json())
    for key in ("links", "host", "rank_speeds", "dispatch_ms", "link"):
        del content[key]
    del content["sizes"][0]["blocks"][0]["workspace_bytes"]
    assert Profile.from_json(json.dumps(content)) == profile


def _set(content: Any, path: str, value: Any) -> None:
    *way, last = (int(part) if part.isdigit() else part for part in path.split("/"))
    for part in way:
        content = content[part]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("format", 7, "format is 7, not 2"),
        ("sizes/0/blocks/1/forward_ms", -1, "'block.1' for 1 samples has forward_ms = -1"),
        ("sizes/0/blocks/1/forward_ms", "fast", "sizes[0].blocks[1]: forward_ms = 'fast' is not a number"),
        ("sizes/0/blocks/1/activation_bytes", 1.5, "activation_bytes = 1.5 is not a whole number"),
        ("sizes/0/blocks/1/colour", 1, "'colour' is not a known key"),
        ("sizes", [], "it has no blocks"),
        ("sizes", 3, "sizes = 3 is not a list"),
        ("rank_speeds", [1, 0], "rank_speeds[1] is 0"),
        ("rank_speeds", ["fast"], "rank_speeds has 'fast'"),
        ("link/bytes_per_ms", 0, "bytes_per_ms 0; use null"),
        ("link/latency_ms", True, "link: latency_ms = True is not a number"),
        ("machine", "mine", "machine = 'mine' is not a JSON object"),
    ],
)
def test_wrong_values_are_named(path: str, value: Any, words: str) -> None:
    content = json.loads(uniform_profile(2).to_json())
    _set(content, path, value)
    with pytest.raises(PlanError) as caught:
        Profile.from_json(json.dumps(content), "p.json")
    assert words in str(caught.value)


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    content = json.loads(uniform_profile(2).to_json())
    del content["sizes"][0]["blocks"][1]["input_bytes"]
    with pytest.raises(PlanError, match=r"sizes\[0\].blocks\[1\]: has no 'input_bytes'"):
        Profile.from_json(json.dumps(content))
    with pytest.raises(PlanError, match="is not JSON"):
        Profile.from_json("{")
    with pytest.raises(PlanError, match="vpipe profile CONFIG -o"):
        read_profile(tmp_path / "none.json")


def test_sizes_are_ascending_and_of_the_same_blocks() -> None:
    one, two = uniform_profile(2).sizes[0], uniform_profile(3).sizes[0]
    with pytest.raises(PlanError, match="give each once, ascending"):
        Profile("x", {}, (one, one))
    with pytest.raises(PlanError, match="the blocks for 4 samples are not those for 1"):
        Profile("x", {}, (one, SizeProfile(4, two.blocks)))


def test_a_size_between_two_lies_between_them() -> None:
    small = SizeProfile(2, (block("a", forward_ms=1.0, activation_bytes=100),))
    large = SizeProfile(6, (replace(small.blocks[0], forward_ms=2.0, activation_bytes=301),))
    profile = Profile("x", {}, (small, large))
    assert profile.at(6) is large
    assert profile.at(3).blocks[0].forward_ms == 1.25
    assert profile.at(3).blocks[0].activation_bytes == 151  # 150.25, never less than that
    assert profile.at(3).blocks[0].parameter_bytes == 40
    with pytest.raises(PlanError, match="says nothing of 8; profile that size too"):
        profile.at(8)
