"""Weights out, to where transformers loads them."""

import pytest
import torch
from bert_toys import batch, build, model_state, run, toy_chain, toy_config
from safetensors.torch import load_file
from torch import nn
from transformers import BertForPreTraining

from vpipe.errors import ModelError
from vpipe.model.chain import Chain
from vpipe.model.export import save_shard, shard_path, write_config, write_index
from vpipe.model.loss import CallableLoss
from vpipe.model.pretrained import initialise_from


def save(directory, chain, modules, cuts):
    """Write one shard for each stage between `cuts`, last stage first: stages finish in any order."""
    stages = list(zip([0, *cuts], [*cuts, len(chain)], strict=True))
    for stage in reversed(range(len(stages))):
        states = {index: modules[index].state_dict() for index in range(*stages[stage])}
        save_shard(directory, chain, states, stage, len(stages))
    write_index(directory, chain, len(stages))
    write_config(directory, toy_config(), tie_weights=bool(chain.tied))


@pytest.mark.parametrize("cuts", [(), (1, 4)], ids=["1 stage", "3 stages"])
@pytest.mark.parametrize("tie_weights", [True, False], ids=["tied", "untied"])
def test_transformers_loads_what_the_stages_wrote(tmp_path, tie_weights, cuts):
    chain = toy_chain(tie_weights)
    modules = [module.eval() for module in build(chain, seed=9)]
    save(tmp_path, chain, modules, cuts)
    model, loading = BertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.tie_word_embeddings == tie_weights
    assert model.config.architectures == ["BertForPreTraining"]
    fields = batch(targets=1.0)
    values, expected = run(chain, modules, fields), model.eval()(**fields)
    assert torch.equal(values["mlm_logits"], expected.prediction_logits.flatten(0, 1))
    assert torch.equal(values["nsp_logits"], expected.seq_relationship_logits)


@pytest.mark.parametrize("tie_weights", [True, False], ids=["tied", "untied"])
def test_what_goes_out_comes_in_again(tmp_path, tie_weights):
    chain = toy_chain(tie_weights)
    modules = build(chain, seed=9)
    save(tmp_path, chain, modules, (2,))
    again = initialise_from(chain, tmp_path)
    expected = model_state(chain, modules)
    for name, tensor in model_state(again, build(again, seed=1)).items():
        assert torch.equal(tensor, expected[name]), name


def test_weights_that_cannot_be_written_are_told(tmp_path):
    chain = toy_chain(tie_weights=True)
    shard_path(tmp_path, 0, 1).with_suffix(".partial").mkdir()  # as good as a full disk
    state = chain.materialise(4, 0).state_dict()
    with pytest.raises(ModelError, match=r"cannot write the weights to '.*safetensors': .*; free some space"):
        save_shard(tmp_path, chain, {4: state}, stage=0, num_stages=1)


def test_of_tied_weights_only_the_first_is_written(tmp_path):
    chain = toy_chain(tie_weights=True)
    state = chain.materialise(4, 0).state_dict()
    path = save_shard(tmp_path, chain, {4: state}, stage=2, num_stages=3)
    assert path == shard_path(tmp_path, 2, 3) == tmp_path / "model-00003-of-00003.safetensors"
    written = load_file(path)
    assert "cls.predictions.bias" in written
    assert not {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} & set(written)
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_that_share_memory_are_written(tmp_path):
    layer = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    layer[1].weight = layer[0].weight
    chain = Chain.from_modules([layer], CallableLoss(nn.functional.mse_loss))
    path = save_shard(tmp_path, chain, {0: layer.state_dict()}, 0, 1)
    assert torch.equal(load_file(path)["0.1.weight"], layer[0].weight)
    flat = torch.arange(32.0)
    views = {"0.weight": flat[:16].view(4, 4), "1.weight": flat[16:].view(4, 4)}
    save_shard(tmp_path, chain, {0: views}, 0, 1)
    assert torch.equal(load_file(path)["0.1.weight"], views["1.weight"])
    assert write_index(tmp_path, chain, 1).exists()


def test_the_index_needs_all_stages_and_all_tensors(tmp_path):
    chain = toy_chain()
    modules = build(chain)
    save_shard(tmp_path, chain, {index: modules[index].state_dict() for index in (0, 1)}, 0, 2)
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors' is missing; every stage saves its shard"):
        write_index(tmp_path, chain, 2)
    save_shard(tmp_path, chain, {index: modules[index].state_dict() for index in (2, 3)}, 1, 2)
    with pytest.raises(ModelError, match=r"lack \d+ tensors of the model, first 'bert.encoder.layer.1.intermediate"):
        write_index(tmp_path, chain, 2)


def test_a_directory_with_another_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"already holds a model.safetensors; remove it or save to another directory"):
        save_shard(tmp_path, toy_chain(), {}, 0, 1)
