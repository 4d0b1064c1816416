from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vpipe.data.bert.dataset import open_bert
from vpipe.data.bert.meta import BertMeta, Masking, Split
from vpipe.data.bert.prepare import prepare_bert
from vpipe.data.source import BatchSource, FieldSpec
from vpipe.errors import DataError

FIELDS = ["input_ids", "token_type_ids", "attention_mask", "labels", "next_sentence_label"]


@pytest.fixture(scope="module")
def static(prepared: tuple[Path, BertMeta]) -> Path:
    return prepared[0]


@pytest.fixture(scope="module")
def dynamic(prepared: tuple[Path, BertMeta], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "dynamic"
    prepare_bert([text_file], out, replace(prepared[1].options, masking="dynamic"))
    return out


@pytest.fixture
def copy(static: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(static, tmp_path / "copy"))


def test_fields(static: Path) -> None:
    data = open_bert(static)
    assert isinstance(data, BatchSource)
    assert list(data.fields) == FIELDS
    assert data.fields["labels"] == FieldSpec((32,), torch.int64)
    batch = data.batch([3, 1, 2], FIELDS)
    assert list(batch) == FIELDS
    for name, tensor in batch.items():
        assert tensor.shape == data.fields[name].shape(3)
        assert tensor.dtype == data.fields[name].dtype


def test_segments_and_padding(static: Path) -> None:
    data = open_bert(static)
    batch = data.batch(range(data.num_samples), FIELDS)
    ids, types, attention = batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
    assert torch.equal(ids == 0, attention == 0)
    assert (ids[:, 0] == 2).all()
    lengths = attention.sum(dim=1)
    rows = torch.arange(len(ids))
    assert (ids[rows, lengths - 1] == 3).all()
    middle = attention.sum(dim=1) - types.sum(dim=1)
    assert (ids[rows, middle - 1] == 3).all()
    assert (types[rows, middle] == 1).all()
    assert (types[rows, middle - 1] == 0).all()
    assert ((types == 1) & (attention == 0)).sum() == 0


@pytest.mark.parametrize("masking", ["static", "dynamic"])
def test_fields_read_alone_or_together_are_equal(static: Path, dynamic: Path, masking: str) -> None:
    data = open_bert(static if masking == "static" else dynamic)
    together = data.batch([5, 0, 9], FIELDS, epoch=2)
    for name in FIELDS:
        assert torch.equal(data.batch([5, 0, 9], [name], epoch=2)[name], together[name])
    for row, sample in enumerate([5, 0, 9]):
        assert torch.equal(data.batch([sample], ["input_ids"], epoch=2)["input_ids"][0], together["input_ids"][row])


def test_static_masks_stay_and_dynamic_masks_change(static: Path, dynamic: Path) -> None:
    for directory, same in ((static, True), (dynamic, False)):
        data = open_bert(directory)
        first, second = (data.batch(range(20), FIELDS, epoch=epoch) for epoch in (0, 1))
        assert torch.equal(first["labels"], second["labels"]) is same
        assert torch.equal(first["next_sentence_label"], second["next_sentence_label"])


def test_dynamic_masks_depend_on_the_seed(dynamic: Path) -> None:
    one, other = (open_bert(dynamic, seed=seed).batch(range(9), ["labels"])["labels"] for seed in (1, 2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("masking", ["static", "dynamic"])
@pytest.mark.parametrize("epoch", [0, 3])
def test_either_kind_of_set_can_be_read_either_way(
    static: Path, dynamic: Path, split: Split, masking: Masking, epoch: int
) -> None:
    one, other = (
        open_bert(directory, split, masking=masking).batch(range(9), FIELDS, epoch=epoch)
        for directory in (static, dynamic)
    )
    for name in FIELDS:
        assert torch.equal(one[name], other[name]), name


def test_evaluation_is_always_masked_the_same(dynamic: Path) -> None:
    first = open_bert(dynamic, "eval", seed=1).batch(range(5), ["labels"], epoch=0)["labels"]
    second = open_bert(dynamic, "eval", seed=2).batch(range(5), ["labels"], epoch=1)["labels"]
    assert torch.equal(first, second)


def test_arrays_are_mapped_and_not_read(static: Path) -> None:
    data = open_bert(static)
    maps = Path("/proc/self/maps").read_text()
    for name in ("input_ids", "labels", "spans", "next_sentence_label"):
        assert str(static.resolve() / "train" / f"{name}.npy") in maps
    assert data.num_samples > 0


def test_only_what_is_asked_for_is_read(static: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_bert(static)
    for name in ("input_ids", "labels", "spans"):
        monkeypatch.delitem(data._arrays, name)
    assert list(data.batch([0], ["next_sentence_label"])) == ["next_sentence_label"]


def test_unknown_field_and_sample(static: Path) -> None:
    data = open_bert(static)
    with pytest.raises(DataError, match="no field 'input_id'; it has input_ids, "):
        data.batch([0], ["input_id"])
    with pytest.raises(DataError, match=f"the data has samples 0 to {data.num_samples - 1}"):
        data.batch([data.num_samples], ["labels"])


def test_missing_directory(tmp_path: Path) -> None:
    message = (
        rf"no prepared data in {tmp_path}/x; make it with `vpipe data prepare bert --out {tmp_path}/x`, "
        r"or correct data.data_dir \(a relative one starts from the folder of the run's YAML file\)"
    )
    with pytest.raises(DataError, match=message):
        open_bert(tmp_path / "x")


def test_directory_without_meta(copy: Path) -> None:
    (copy / "meta.json").unlink()
    with pytest.raises(DataError, match=r"has no meta.json, so it is no prepared set; make one with"):
        open_bert(copy)


def _truncate_meta(directory: Path) -> None:
    path = directory / "meta.json"
    path.write_text(path.read_text()[:100])


def _other_version(directory: Path) -> None:
    path = directory / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))


def _bad_option(directory: Path) -> None:
    path = directory / "meta.json"
    meta = json.loads(path.read_text())
    meta["options"]["seed"] = -1
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(_truncate_meta, "EOF"), (_other_version, "version Input should be 1"), (_bad_option, "--seed must be")],
)
def test_damaged_meta(copy: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(copy)
    with pytest.raises(DataError, match=rf"meta.json is damaged or from another version \(.*{reason}.* --force`"):
        open_bert(copy)


FIX = r"; prepare it again with `vpipe data prepare bert --out \S+copy --input \S+/rain.txt --vocab-size 400 .*--force`"


@pytest.mark.parametrize("name", ["train/labels.npy", "eval/spans.npy", "vocab.txt"])
def test_truncated_file(copy: Path, name: str) -> None:
    size = (copy / name).stat().st_size
    with (copy / name).open("r+b") as file:
        file.truncate(size - 10)
    with pytest.raises(DataError, match=f"{name} is truncated: {size - 10} bytes, {size} were written{FIX}"):
        open_bert(copy)


@pytest.mark.parametrize("name", ["train/input_ids.npy", "tokenizer.json"])
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing{FIX}"):
        open_bert(copy)


def test_swapped_arrays(copy: Path) -> None:
    path = copy / "train" / "labels.npy"
    np.save(path, np.load(path).astype(np.uint16))
    with pytest.raises(DataError, match=rf"labels.npy holds uint16 of shape .* meta.json says int16 .*{FIX}"):
        open_bert(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 10_000},
        {"arrays": {}},
        {"arrays": {"input_ids": {"file": "train/input_ids.npy", "num_bytes": 1, "sha256": ""}}},
    ],
)
def test_a_description_that_does_not_fit_its_arrays(copy: Path, change: dict[str, object]) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    meta["splits"]["train"] |= change
    (copy / "meta.json").write_text(json.dumps(meta))
    message = (
        r"meta.json is damaged .*split train has \d+ samples of 32 tokens, static masking, and arrays of the shapes "
    )
    with pytest.raises(DataError, match=message):
        open_bert(copy)


@pytest.mark.parametrize(
    ("name", "field", "value", "why"),
    [
        ("input_ids", "input_ids", 65535, r"the vocabulary has (\d+) tokens, so 0 to"),
        ("input_ids", "attention_mask", 65535, None),
        ("labels", "labels", 32767, r"the vocabulary has (\d+) tokens, so 0 to"),
        ("labels", "labels", -7, r"the vocabulary has (\d+) tokens, so 0 to"),
        ("spans", "attention_mask", 33, "sequences have 32 tokens, so 0 to 32 can be there"),
        ("spans", "token_type_ids", -1, "sequences have 32 tokens, so 0 to 32 can be there"),
        ("next_sentence_label", "next_sentence_label", 2, "so 0 to 1 can be there"),
    ],
)
def test_values_that_no_set_has_are_refused_when_they_are_read(
    copy: Path, name: str, field: str, value: int, why: str | None
) -> None:
    path = copy / "train" / f"{name}.npy"
    np.load(path, mmap_mode="r+").reshape(len(np.load(path)), -1)[4, 0] = value
    data = open_bert(copy)
    data.batch([0, 1, 2, 3, 5], FIELDS)
    if why is None:
        data.batch([4], [field])
        return
    with pytest.raises(DataError, match=f"{name}.npy is damaged: sample 4 has the value {value}, and .*{why}.*{FIX}"):
        data.batch([5, 4], [field])


def test_damaged_tokens_of_a_dynamic_set_are_refused(dynamic: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dynamic, tmp_path / "copy")
    np.load(copy / "train" / "tokens.npy", mmap_mode="r+")[2, 1] = 40000
    with pytest.raises(DataError, match=r"tokens.npy is damaged: sample 2 has the value 40000, and the vocabulary"):
        open_bert(copy).batch([0, 1, 2], ["labels"])


@pytest.mark.parametrize(
    ("position", "byte"),
    [(0, b"P"), (8, b"\x01"), (21, b","), (26, b"B")],
    ids=["not an array", "a head of one byte", "no type", "a key of bytes"],
)
def test_a_damaged_head_of_an_array_is_told(copy: Path, position: int, byte: bytes) -> None:
    path = copy / "train" / "input_ids.npy"
    content = bytearray(path.read_bytes())
    content[position : position + 1] = byte
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"input_ids.npy is no array file \(.*\){FIX}"):
        open_bert(copy)


def test_changed_bytes_are_found_by_verify(copy: Path) -> None:
    path = copy / "train" / "labels.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    open_bert(copy)
    with pytest.raises(DataError, match=f"labels.npy has other content than was written .*{FIX}"):
        open_bert(copy, verify=True)


def test_another_sequence_length(static: Path) -> None:
    message = (
        r"sequences of 32 tokens, the run expects 64; set data.sequence_length: 32, or run `.*--sequence-length 64 .*`"
    )
    with pytest.raises(DataError, match=message):
        open_bert(static, sequence_length=64)


def test_vocabulary_must_fit_the_model(prepared: tuple[Path, BertMeta]) -> None:
    size = prepared[1].vocab_size
    open_bert(prepared[0], vocab_size=size)
    open_bert(prepared[0], vocab_size=size + 1)
    message = rf"a vocabulary of {size} tokens, the model's has 100; set model.vocab_size: {size} .*--vocab-size 100 "
    with pytest.raises(DataError, match=message):
        open_bert(prepared[0], vocab_size=100)


def test_the_command_in_a_message_works(prepared: tuple[Path, BertMeta], text_file: Path) -> None:
    command = prepared[1].command(Path("my data"))
    assert command.startswith(f"vpipe data prepare bert --out 'my data' --input {text_file} --vocab-size 400 ")
    assert command.endswith("--eval-fraction 0.2 --seed 3 --force")
