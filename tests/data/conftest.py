from __future__ import annotations

import random
from pathlib import Path

import pytest

from vpipe.data.bert.meta import BertMeta, BertOptions
from vpipe.data.bert.prepare import prepare_bert

NUM_DOCUMENTS = 60
OPTIONS = BertOptions(vocab_size=400, sequence_length=32, eval_fraction=0.2, seed=3)


def unique_word(document: int) -> str:
    """A word that no other document has, of letters that no ordinary word is made of."""
    return "q" + "".join("zxjvwykqb"[int(digit) % 9] for digit in f"{document:03b}".zfill(8)) + "q"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(1)
    words = [*"abcdef", "the", "rain", "spain", "falls", "plain", "near", "some", "tall", "green", "hill", "noon"]
    documents = []
    for number in range(NUM_DOCUMENTS):
        sentences = []
        for _ in range(rng.randint(2, 9)):
            sentence = [*rng.choices(words, k=rng.randint(3, 9)), unique_word(number)]
            sentences.append(" ".join(sentence).capitalize() + ".")
        documents.append(" ".join(sentences))
    path = tmp_path_factory.mktemp("text") / "rain.txt"
    path.write_text("\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BertMeta]:
    out = tmp_path_factory.mktemp("sets") / "static"
    return out, prepare_bert([text_file], out, OPTIONS)
