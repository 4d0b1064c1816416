"""A second preparation into the same folder: what is there is told, never mixed up with what is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vpipe.data.bert.dataset import open_bert
from vpipe.data.bert.meta import BertMeta, BertOptions
from vpipe.data.bert.prepare import prepare_bert
from vpipe.errors import DataError

SMALL = BertOptions(vocab_size=100, sequence_length=16, eval_fraction=0)


def refusal(inputs: list[Path], out: Path, options: BertOptions) -> str:
    with pytest.raises(DataError) as error:
        prepare_bert(inputs, out, options)
    return str(error.value)


def test_another_file_of_the_same_name_is_another_text(prepared: tuple[Path, BertMeta], tmp_path: Path) -> None:
    out, meta = prepared
    namesake = tmp_path / meta.origins[0].name
    namesake.write_text("not\n\nthe\n\nsame")
    message = refusal([namesake], out, meta.options)
    assert f"{out} already holds a set prepared from other text ({meta.origins[0].path} (" in message
    assert f"asked for now: {namesake} (14 bytes, sha256 " in message
    assert "add --force to replace it, or choose another --out" in message


def test_the_same_text_can_be_used_as_it_is(prepared: tuple[Path, BertMeta], text_file: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "copied.txt"
    elsewhere.write_bytes(text_file.read_bytes())
    assert "from the same text with the same options, so it can be used" in refusal(
        [elsewhere], prepared[0], prepared[1].options
    )


def test_text_and_options_that_differ_are_both_told(prepared: tuple[Path, BertMeta]) -> None:
    message = refusal([], prepared[0], replace(prepared[1].options, seed=4))
    assert "asked for now: the text that comes with Python) and with other options (" in message
    assert "--seed 4)" in message


def test_the_command_that_repairs_a_set_names_the_very_files(tmp_path: Path) -> None:
    files = []
    for name, word in (("one", "rain"), ("two", "snow")):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "text.txt")
        files[-1].write_text("\n\n".join(f"{word} falls {number}.\nAnd {word} again." for number in range(9)))
    prepare_bert(files, tmp_path / "set", SMALL)
    (tmp_path / "set" / "vocab.txt").unlink()
    with pytest.raises(
        DataError, match=f"bert --out {tmp_path}/set --input {files[0]} --input {files[1]} --vocab-size"
    ):
        open_bert(tmp_path / "set")
