# ruff: noqa: RUF001 (Chinese punctuation)
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from vpipe.data.bert.dataset import BertDataset, open_bert
from vpipe.data.bert.meta import BertMeta, BertOptions, Split
from vpipe.data.bert.prepare import prepare_bert
from vpipe.data.text.vocabulary import CLS, SEP, UNK
from vpipe.errors import ConfigError, DataError

SMALL = BertOptions(vocab_size=100, sequence_length=16)

POEMS = [
    "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。",
    "春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。",
    "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。",
    "千山鳥飛絕，萬徑人蹤滅。孤舟蓑笠翁，獨釣寒江雪。",
    "紅豆生南國，春來發幾枝。願君多采擷，此物最相思。",
    "空山不見人，但聞人語響。返景入深林，復照青苔上。",
]


def _bytes(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _texts(root: Path, data: BertDataset) -> list[str]:
    """Give each sample as it was before masking."""
    batch = data.batch(range(data.num_samples), ["input_ids", "labels"])
    tokens = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    return [tokenizer.decode(row) for row in tokens.tolist()]


def _write(path: Path, *documents: str) -> Path:
    path.write_text("\n".join(documents), encoding="utf-8")
    return path


def test_equal_text_and_seed_give_equal_bytes(prepared: tuple[Path, BertMeta], text_file: Path, tmp_path: Path) -> None:
    out, meta = prepared
    command = [sys.executable, "-m", "vpipe", "data", "prepare", "bert", "--input", str(text_file)]
    options = ["--out", str(tmp_path / "again"), *meta.options.flags()]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([*command, *options], check=True, capture_output=True, env=environment)
    assert _bytes(tmp_path / "again") == _bytes(out)


def test_another_seed_gives_another_set(prepared: tuple[Path, BertMeta], text_file: Path, tmp_path: Path) -> None:
    meta = prepare_bert([text_file], tmp_path / "set", replace(prepared[1].options, seed=99))
    assert meta.fingerprint != prepared[1].fingerprint


def test_no_document_is_in_both_splits(prepared: tuple[Path, BertMeta]) -> None:
    out, meta = prepared
    words: dict[Split, set[str]] = {}
    for split in ("train", "eval"):
        text = " ".join(_texts(out, open_bert(out, split)))
        words[split] = set(re.findall(r"\bq\w{8}q\b", text))
    assert not words["train"] & words["eval"]
    assert len(words["train"]) == meta.splits["train"].num_documents == 48
    assert len(words["eval"]) == meta.splits["eval"].num_documents == 12


def test_copies_of_a_document_do_not_leak(tmp_path: Path) -> None:
    documents = [f"alpha {word} beta. Gamma {word} delta." for word in ("one", "two", "six", "ten", "red")]
    meta = prepare_bert([_write(tmp_path / "a.txt", *documents * 4)], tmp_path / "set", SMALL)
    assert meta.num_duplicates == 15
    assert sum(split.num_documents for split in meta.splits.values()) == 5


def test_tokenizer_learns_from_training_documents_only(prepared: tuple[Path, BertMeta]) -> None:
    out, _ = prepared
    evaluated = set(re.findall(r"\bq\w{8}q\b", " ".join(_texts(out, open_bert(out, "eval")))))
    vocab = set((out / "vocab.txt").read_text(encoding="utf-8").split("\n"))
    assert evaluated
    assert not evaluated & vocab


def test_meta_states_the_sizes(prepared: tuple[Path, BertMeta]) -> None:
    out, meta = prepared
    written = json.loads((out / "meta.json").read_text())
    train = written["splits"]["train"]
    assert written["vocab_size"] == len((out / "vocab.txt").read_text(encoding="utf-8").splitlines()) <= 400
    assert train["arrays"]["input_ids"]["shape"] == [train["num_samples"], 32]
    attention = open_bert(out).batch(range(train["num_samples"]), ["attention_mask"])["attention_mask"]
    assert int(attention.sum()) == train["num_tokens"]
    assert written["origins"][0]["name"] == "rain.txt"
    assert BertMeta.model_validate(written) == meta


def test_half_of_the_pairs_are_random(prepared: tuple[Path, BertMeta]) -> None:
    out, meta = prepared
    train = meta.splits["train"]
    labels = open_bert(out).batch(range(train.num_samples), ["next_sentence_label"])["next_sentence_label"]
    assert int(labels.sum()) == train.num_random_next
    assert train.num_random_next / train.num_samples == pytest.approx(0.5, abs=0.15)


def test_limit_and_passes(text_file: Path, tmp_path: Path) -> None:
    limited = prepare_bert([text_file], tmp_path / "a", replace(SMALL, limit_samples=7))
    assert [split.num_samples for split in limited.splits.values()] == [7, 7]
    once = prepare_bert([text_file], tmp_path / "b", SMALL).splits["train"].num_samples
    thrice = prepare_bert([text_file], tmp_path / "c", replace(SMALL, num_passes=3)).splits["train"].num_samples
    assert thrice == pytest.approx(3 * once, rel=0.1)


def test_no_evaluation_split(text_file: Path, tmp_path: Path) -> None:
    meta = prepare_bert([text_file], tmp_path / "set", replace(SMALL, eval_fraction=0))
    assert list(meta.splits) == ["train"]
    with pytest.raises(
        DataError, match=r"without 'eval'; run `vpipe data prepare bert --out \S+set --input \S+/rain.txt"
    ):
        open_bert(tmp_path / "set", "eval")


def test_chinese(tmp_path: Path) -> None:
    text = _write(tmp_path / "poems.txt", *POEMS)
    options = BertOptions(vocab_size=300, sequence_length=32, eval_fraction=0.34, num_passes=5)
    meta = prepare_bert([text], tmp_path / "set", options)
    assert meta.origins[0].rule == "line"
    assert meta.splits["train"].unknown_share == 0
    assert meta.splits["train"].num_samples >= 4
    samples = _texts(tmp_path / "set", open_bert(tmp_path / "set"))
    poems = [set(poem) for poem in POEMS]
    assert all(any(set(sample.replace(" ", "")[:4]) <= poem for poem in poems) for sample in samples)
    assert any(sample.replace(" ", "") in POEMS for sample in samples)


def test_special_tokens_in_the_text_are_text(tmp_path: Path) -> None:
    documents = [f"Here is [SEP] and [CLS] word {number}. There is more [MASK] text." for number in range(20)]
    prepare_bert([_write(tmp_path / "a.txt", *documents)], tmp_path / "set", replace(SMALL, sequence_length=64))
    data = open_bert(tmp_path / "set", masking="static")
    batch = data.batch(range(data.num_samples), ["input_ids", "labels"])
    tokens = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    assert ((tokens == CLS).sum(dim=1) == 1).all()
    assert ((tokens == SEP).sum(dim=1) == 2).all()
    assert "[" in (tmp_path / "set" / "vocab.txt").read_text().split("\n")


def test_characters_outside_the_alphabet_are_unknown(tmp_path: Path) -> None:
    text = _write(tmp_path / "poems.txt", *POEMS)
    meta = prepare_bert([text], tmp_path / "set", replace(SMALL, limit_alphabet=10, eval_fraction=0.34))
    assert meta.splits["train"].unknown_share > 0.5
    data = open_bert(tmp_path / "set")
    assert (data.batch([0], ["input_ids"])["input_ids"] == UNK).any()


def test_short_texts(tmp_path: Path) -> None:
    meta = prepare_bert([_write(tmp_path / "a.txt", "a b", "c d", "e f", "g h")], tmp_path / "set", SMALL)
    assert [split.num_samples for split in meta.splits.values()] == [2, 2]


def test_too_short_texts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the 2 training documents are too short to make a pair; give more text"):
        prepare_bert([_write(tmp_path / "a.txt", "a", "b", "c", "d")], tmp_path / "set", SMALL)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("One line. It has two sentences.", ""),
        ("----\n\nOne line.\n\nOne  line.", ""),
        ("One.\n\nTwo.", ", or use --eval-fraction 0"),
        ("One.\nTwo.\n\nThree.\nFour.", ", or use --documents line or --eval-fraction 0"),
        ("One.\n\nTwo.\n\n\nThree.\n\nFour.", ", or use --documents blank-line or --documents line or --ev.* 0"),
    ],
)
def test_too_few_documents_are_told_what_works(tmp_path: Path, text: str, advice: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    options = replace(SMALL, documents="two-blank-lines" if "\n\n\n" in text else "blank-line")
    with pytest.raises(DataError, match=rf"at least 4 are needed \(.*\); give more text{advice}$"):
        prepare_bert([tmp_path / "a.txt"], tmp_path / "set", options)


def test_one_document(tmp_path: Path) -> None:
    text = _write(tmp_path / "a.txt", "One line. It has two sentences.")
    with pytest.raises(DataError, match=r"has 1 different documents with words, at least 2 are needed .*more text$"):
        prepare_bert([text], tmp_path / "set", replace(SMALL, eval_fraction=0))


def test_text_of_rules_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the text has 0 different documents with words"):
        prepare_bert([_write(tmp_path / "a.txt", "----", "====")], tmp_path / "set", SMALL)


def test_interrupted_preparation_leaves_nothing(text_file: Path, tmp_path: Path) -> None:
    def interrupt(step: str, done: int, total: int) -> None:
        if step == "write evaluation samples":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_bert([text_file], tmp_path / "set", SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_existing_set_is_refused_before_any_work(prepared: tuple[Path, BertMeta], tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"already holds a set prepared from other text .*no such file\).*; add --force"
    ):
        prepare_bert([tmp_path / "no such file"], prepared[0], SMALL)


def test_progress_is_told(text_file: Path, tmp_path: Path) -> None:
    heard: dict[str, tuple[int, int]] = {}
    prepare_bert([text_file], tmp_path / "set", SMALL, progress=lambda step, *counts: heard.update({step: counts}))
    assert list(heard)[:3] == ["read", "find sentences", "train the tokenizer"]
    assert all(done == total for done, total in heard.values())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"vocab_size": 10}, "--vocab-size must be at least 64, got 10"),
        ({"vocab_size": 10**11}, "--vocab-size must be at most 1000000, got 100000000000"),
        ({"sequence_length": 10**9}, "--sequence-length must be at most 131072, got 1000000000"),
        ({"sequence_length": 4}, "--sequence-length must be at least 8, got 4"),
        ({"eval_fraction": 1.0}, "--eval-fraction must be at least 0 and below 1, got 1.0"),
        ({"limit_samples": 0}, "--limit-samples must be at least 1, got 0"),
        ({"num_passes": 0}, "--passes must be at least 1, got 0"),
        ({"masking": "sometimes"}, "--masking must be one of static, dynamic, got 'sometimes'"),
        ({"documents": "page"}, "--documents must be one of auto, .*, got 'page'"),
    ],
)
def test_options_out_of_range(option: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BertOptions(**option)  # type: ignore[arg-type]


def test_flags_are_those_that_differ() -> None:
    assert BertOptions().flags() == []
    options = BertOptions(lowercase=False, num_passes=3, masking="dynamic", documents="line")
    assert options.flags() == ["--masking", "dynamic", "--passes", "3", "--cased", "--documents", "line"]
