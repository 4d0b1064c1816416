"""Models by config."""

import pytest
import torch
from bert_toys import theirs

from vpipe.config.sections import ModelConfig
from vpipe.errors import ModelError
from vpipe.model.chain import Chain
from vpipe.model.zoo import bert_config_of, build_chain

TOY = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
CUSTOM = """
import torch
from torch import nn
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss

DRAWN = torch.rand(1)

def build(width, depth=2):
    return Chain.from_modules([nn.Linear(width, width) for _ in range(depth)], CallableLoss(nn.functional.mse_loss))

def layers():
    return nn.Sequential(nn.Linear(2, 2))

def number():
    return 3

def fails():
    raise KeyError("gone")
"""


@pytest.fixture
def custom(tmp_path):
    (tmp_path / "mine.py").write_text(CUSTOM)

    def make(entry, **options):
        return build_chain(ModelConfig(type="custom", entry=entry, options=options), directory=tmp_path)

    return make


def test_a_bert_has_the_sizes_of_the_config():
    settings = ModelConfig(type="bert", **TOY, dropout=0.3, attention_dropout=0.0, vocab_size=50)
    config = bert_config_of(settings, data_vocab_size=40)
    chain = build_chain(settings, data_vocab_size=40)
    assert len(chain) == 5
    assert (config.vocab_size, config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (50, 0.3, 0.0)
    assert chain.materialise(0, 0).embeddings.word_embeddings.weight.shape == (50, 32)


def test_a_preset_is_the_published_model():
    assert len(build_chain(ModelConfig(size="large"))) == 49


@pytest.mark.parametrize(("data_vocab_size", "expected"), [(None, 30522), (41, 41)])
def test_the_vocabulary_is_that_of_the_data_unless_the_config_says_otherwise(data_vocab_size, expected):
    assert bert_config_of(ModelConfig(**TOY), data_vocab_size).vocab_size == expected


def test_a_vocabulary_smaller_than_the_data_is_refused():
    with pytest.raises(
        ModelError, match=r"data uses 60 tokens and the model knows 50; set model\.vocab_size to at least 60"
    ):
        build_chain(ModelConfig(**TOY, vocab_size=50), data_vocab_size=60)


def test_tie_weights_ties():
    assert build_chain(ModelConfig(**TOY, tie_weights=True)).tied
    assert not build_chain(ModelConfig(**TOY)).tied


def test_init_from_takes_weights_and_what_the_config_cannot_say(tmp_path):
    reference = theirs(tie_weights=True)
    reference.config.layer_norm_eps = 1e-5
    reference.save_pretrained(tmp_path)
    settings = ModelConfig(**TOY, init_from=tmp_path, dropout=0.4)
    config = bert_config_of(settings, data_vocab_size=90)
    assert (config.layer_norm_eps, config.hidden_dropout_prob, config.vocab_size) == (1e-5, 0.4, 97)
    words = build_chain(settings, data_vocab_size=90).materialise(0, 0).embeddings.word_embeddings.weight
    assert torch.equal(words, reference.bert.embeddings.word_embeddings.weight)


def test_init_from_of_another_size_is_refused(tmp_path):
    theirs(tie_weights=True).save_pretrained(tmp_path)
    settings = ModelConfig(**TOY | {"num_layers": 3}, init_from=tmp_path, vocab_size=98)
    with pytest.raises(ModelError) as error:
        build_chain(settings)
    assert str(error.value) == (
        f"the model in '{tmp_path}' has num_layers 2 and not 3, vocab_size 97 and not 98; "
        "set model.num_layers: 2, model.vocab_size: 97"
    )


def test_init_from_must_be_a_bert(tmp_path):
    settings = ModelConfig(**TOY, init_from=tmp_path)
    with pytest.raises(
        ModelError, match=r"model\.init_from needs a transformers directory with a config\.json: .*No such"
    ):
        build_chain(settings)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": "wide"}')
    with pytest.raises(ModelError, match=r"config.json' describes no BERT: .*'hidden_size' expected int, got str"):
        build_chain(settings)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="describes a model of type 'gpt2'; this needs 'bert'"):
        build_chain(settings)


@pytest.mark.parametrize(("kind", "size"), [("gpt", "gpt2"), ("gpt", "gpt3-175b"), ("llama", "llama-70b")])
def test_a_decoder_has_the_sizes_of_the_config(kind, size):
    settings = ModelConfig(type=kind, size=size)
    chain = build_chain(settings)
    assert len(chain) == 2 * settings.num_layers + 2
    assert chain.blocks[0].name == "embedding"


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_a_decoder_takes_the_vocabulary_of_the_data(kind):
    chain = build_chain(ModelConfig(type=kind, **TOY), data_vocab_size=41)
    assert chain.materialise(5, 0).lm_head.weight.shape == (41, 32)
    with pytest.raises(ModelError, match=r"data uses 60 tokens and the model knows 50"):
        build_chain(ModelConfig(type=kind, **TOY, vocab_size=50), data_vocab_size=60)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_a_decoder_whose_heads_do_not_divide_is_refused(sizes, message):
    with pytest.raises(ModelError, match=message):
        build_chain(ModelConfig(type="llama", **TOY | sizes))


def test_a_custom_entry_gives_its_chain(custom):
    chain = custom("mine.py:build", width=3, depth=4)
    assert isinstance(chain, Chain)
    assert len(chain) == 4


@pytest.mark.parametrize(
    ("entry", "options", "message", "cause"),
    [
        (
            "mine.py:layers",
            {},
            r"returned Sequential, not a vpipe Chain; wrap it: Chain\.from_modules\(modules, loss\)",
            None,
        ),
        ("mine.py:number", {}, "returned int, not a vpipe Chain$", None),
        ("mine.py:fails", {}, "model.entry 'mine.py:fails' failed: KeyError: 'gone'", KeyError),
        ("mine.py:build", {"widht": 3}, "failed: TypeError: .*unexpected keyword argument 'widht'", TypeError),
    ],
)
def test_a_custom_entry_that_gives_no_chain_is_refused(custom, entry, options, message, cause):
    with pytest.raises(ModelError, match=message) as error:
        custom(entry, **options)
    assert cause is None or isinstance(error.value.__cause__, cause)


def test_a_custom_model_needs_an_entry():
    with pytest.raises(ModelError, match=r"model.type 'custom' needs model.entry"):
        build_chain(ModelConfig.model_construct(type="custom", entry=None, init_from=None))
    with pytest.raises(ModelError, match=r"model.type 'rnn' is not one of bert, gpt, llama, custom"):
        build_chain(ModelConfig.model_construct(type="rnn"))


def test_an_entry_draws_the_same_weights_in_every_process(tmp_path):
    def first_weight(name, seed):
        (tmp_path / name).write_text(CUSTOM)  # another file is imported anew, as another process does it
        torch.rand(3)
        settings = ModelConfig(type="custom", entry=f"{name}:build", options={"width": 2})
        chain = build_chain(settings, seed=seed, directory=tmp_path)
        return chain.materialise(0, 0).weight

    weight = first_weight("a.py", 1)
    assert torch.equal(first_weight("b.py", 1), weight)
    assert torch.equal(first_weight("a.py", 1), weight)
    assert not torch.equal(first_weight("c.py", 2), weight)
