"""BERT's sizes."""

import pytest
from transformers import BertConfig

from vpipe.errors import ModelError
from vpipe.model.families.bert_config import build_bert_config


@pytest.mark.parametrize(
    ("size", "numbers"),
    [
        ("tiny", (128, 2, 2, 512)),
        ("base", (768, 12, 12, 3072)),
        ("large", (1024, 24, 16, 4096)),
        (None, (768, 12, 12, 3072)),
    ],
)
def test_sizes_are_the_published_ones(size, numbers):
    config = build_bert_config(size)
    found = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert found == numbers
    assert (config.vocab_size, config.max_position_embeddings, config.hidden_dropout_prob) == (30522, 512, 0.1)


def test_overrides_replace_numbers_and_none_does_not():
    config = build_bert_config("large", num_layers=3, dropout=0.0, attention_dropout=0.2, vocab_size=None)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (3, 1024, 30522)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.0, 0.2)


def test_what_a_base_says_and_nobody_overrides_stays():
    base = BertConfig(hidden_act="relu", layer_norm_eps=1e-5, num_hidden_layers=3)
    config = build_bert_config(base=base, dropout=0.3)
    assert (config.hidden_act, config.layer_norm_eps, config.num_hidden_layers) == ("relu", 1e-5, 3)
    assert (config.hidden_dropout_prob, base.hidden_dropout_prob) == (0.3, 0.1)


@pytest.mark.parametrize(
    ("size", "overrides", "message"),
    [
        ("huge", {}, "size 'huge' is not one of tiny, base, large"),
        (None, {"layers": 3}, "BERT has no setting 'layers'; it has hidden_size, num_layers, num_heads"),
        (None, {"hidden_size": 100}, "hidden_size 100 is not a multiple of num_heads 12; take hidden_size 96 or 108"),
        (None, {"hidden_size": 8}, "hidden_size 8 is not a multiple of num_heads 12; take hidden_size 12"),
        (None, {"num_layers": 0}, "num_layers is 0, it must be a whole number of at least 1"),
        (None, {"vocab_size": 10.5}, "vocab_size is 10.5, it must be a whole number"),
        (
            None,
            {"dropout": 1.0, "num_heads": -1},
            "num_heads is -1, it must be a whole number of at least 1; dropout is 1.0, it must be at least 0",
        ),
    ],
)
def test_numbers_that_make_no_bert_are_refused(size, overrides, message):
    with pytest.raises(ModelError) as error:
        build_bert_config(size, **overrides)
    assert message in str(error.value)
