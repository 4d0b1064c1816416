"""Names that were nearly right."""

from __future__ import annotations

from vpipe.words.near import did_you_mean, nearest, plural


def test_the_nearest_name_is_found_whatever_its_capitals() -> None:
    assert nearest("GPIPE", ["gpipe", "1f1b"]) == "gpipe"
    assert nearest("adamw", ["SGD", "AdamW", "Adam"]) == "AdamW"


def test_what_is_like_nothing_gets_no_suggestion() -> None:
    assert nearest("quantum", ["gpipe", "1f1b"]) is None
    assert did_you_mean("quantum", ["gpipe", "1f1b"]) == ""


def test_the_suggestion_is_worded_once() -> None:
    assert did_you_mean("pipedraem", ["gpipe", "pipedream"]) == "; did you mean 'pipedream'?"


def test_a_count_comes_with_its_noun() -> None:
    assert (plural(1, "rank", "ranks"), plural(2, "rank", "ranks")) == ("1 rank", "2 ranks")
