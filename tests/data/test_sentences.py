# ruff: noqa: RUF001 (Chinese punctuation)
from __future__ import annotations

import pytest

from vpipe.data.text.sentences import split_sentences


@pytest.mark.parametrize(
    ("document", "sentences"),
    [
        ("One here. Two there! Three?", ["One here.", "Two there!", "Three?"]),
        ("It is 3.14, i.e. Pi, see e.g. Wikipedia and file.txt now.", None),
        ('He said "Stop." Then (so it was.) They left.', ['He said "Stop."', "Then (so it was.)", "They left."]),
        ("wrapped\nover   lines. Next", ["wrapped over lines.", "Next"]),
        ("Title\n=====\nText here\n\nMore text", ["Title", "Text here", "More text"]),
        ("See:\n- first\n- second\n  goes on\n1. third", ["See:", "- first", "- second goes on", "1. third"]),
        (
            "半生只麽過，鐵作脊梁真自强。偶煩衲子！「何如？」不知",
            ["半生只麽過，鐵作脊梁真自强。", "偶煩衲子！", "「何如？」", "不知"],
        ),
        ("... --- !!!", []),
        ("", []),
    ],
)
def test_sentences(document: str, sentences: list[str] | None) -> None:
    assert split_sentences(document) == ([document] if sentences is None else sentences)


def test_nothing_but_white_space_and_rules_is_lost() -> None:
    document = "Alpha beta. gamma (Delta) 5.6\n\nEpsilon! Zeta\n-----\n* eta? 七。八"
    together = "".join(split_sentences(document)).replace(" ", "")
    assert together == document.replace("-----", "").replace(" ", "").replace("\n", "")
