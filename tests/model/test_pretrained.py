"""Weights of transformers in, and what is wrong with them."""

import json

import pytest
import torch
from bert_toys import build, model_state, theirs, toy_chain
from safetensors.torch import load_file, save_file
from torch import nn

from vpipe.errors import ModelError
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss
from vpipe.model.pretrained import check_weights, initialise_from, load_block, open_weights


@pytest.fixture
def directory(tmp_path):
    theirs(tie_weights=True).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
@pytest.mark.parametrize("tie_weights", [True, False], ids=["tied", "untied"])
def test_a_directory_of_transformers_gives_its_weights(tmp_path, tie_weights, shard_bytes):
    reference = theirs(tie_weights)
    reference.save_pretrained(tmp_path, max_shard_size=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    chain = initialise_from(toy_chain(tie_weights), tmp_path)
    expected = reference.state_dict()
    for name, tensor in model_state(chain, build(chain)).items():
        assert torch.equal(tensor, expected[name]), name


def test_the_weights_of_a_tied_model_may_start_an_untied_one(directory):
    expected = theirs(tie_weights=True).state_dict()
    chain = initialise_from(toy_chain(tie_weights=False), directory)
    ours = model_state(chain, build(chain))
    assert torch.equal(ours["cls.predictions.decoder.weight"], expected["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(ours["cls.predictions.decoder.bias"], expected["cls.predictions.bias"])


def test_the_weights_of_an_untied_model_cannot_start_a_tied_one():
    with pytest.raises(ModelError, match=r"'cls.predictions.decoder.weight' and '.*' differ, and the model ties them"):
        initialise_from(toy_chain(tie_weights=True), theirs(tie_weights=False).state_dict())


def test_only_the_tensors_of_a_block_are_read():
    class Counting(dict):
        reads: list[str] = []  # noqa: RUF012

        def __getitem__(self, name):
            self.reads.append(name)
            return super().__getitem__(name)

    chain = toy_chain()
    state = Counting(theirs(tie_weights=False).state_dict())
    load_block(chain.blocks[1], chain.materialise(1, 0), open_weights(state))
    assert {name.split(".attention.")[0] for name in Counting.reads} == {"bert.encoder.layer.0"}


def test_the_names_of_the_first_checkpoints_are_known(directory):
    state = load_file(directory / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(20)
    assert set(old) - set(state)
    chain = initialise_from(toy_chain(tie_weights=True), old)
    norm = chain.materialise(0, 0).embeddings.LayerNorm
    assert torch.equal(norm.weight, state["bert.embeddings.LayerNorm.weight"])


def test_other_types_are_converted(directory):
    half = {name: tensor.half() for name, tensor in load_file(directory / "model.safetensors").items()}
    module = initialise_from(toy_chain(tie_weights=True), half).materialise(0, 0)
    assert module.embeddings.LayerNorm.weight.dtype == torch.float32


def test_modules_made_on_the_meta_device_are_filled():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].running_mean.fill_(7)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    chain = initialise_from(Chain.from_modules(empty, CallableLoss(nn.functional.mse_loss)), model.state_dict())
    for name, tensor in model_state(chain, build(chain)).items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_checking_and_inferring_read_no_tensor(directory):
    for file in directory.glob("*.safetensors"):
        # The header stays, the numbers become others.
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        file.write_bytes(file.read_bytes()[:header] + bytes(file.stat().st_size - header))
    chain = initialise_from(toy_chain(tie_weights=True), directory)
    assert len(chain.count_parameters()) == 5


def test_weights_of_another_model_are_refused_with_all_reasons():
    state = theirs(tie_weights=False).state_dict()
    state["bert.pooler.dense.bias"] = torch.zeros(31)
    del state["cls.seq_relationship.bias"]
    assert check_weights(toy_chain(), open_weights(state)) == [
        "'bert.pooler.dense.bias' has shape (31,), the model needs (32,)",
        "'cls.seq_relationship.bias' is missing",
    ]
    with pytest.raises(
        ModelError, match=r"the given state_dict do not fit the model: 'bert.pooler.dense.bias' has shape"
    ):
        initialise_from(toy_chain(), state)
    with pytest.raises(ModelError, match=r"do not fit block 'layer.1.feed_forward': 'bert.pooler.dense.bias' has"):
        load_block(toy_chain().blocks[4], toy_chain().materialise(4, 0), open_weights(state))


def test_weights_of_a_deeper_model_are_refused():
    state = theirs(tie_weights=False, num_layers=3).state_dict()
    with pytest.raises(
        ModelError, match=r"'bert.encoder.layer.2.attention.output.LayerNorm.bias' is there, and .* 11 more"
    ):
        initialise_from(toy_chain(num_layers=2), state)


def test_directories_without_weights_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"cannot read weights from '.*nowhere': no such directory"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json$"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"it has pytorch_model\.bin: load that with transformers and save_pretrained"):
        open_weights(tmp_path)


def test_truncated_files_and_wrong_indices_are_refused(tmp_path, directory):
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ModelError, match="the file may be truncated"):
        open_weights(directory)
    file.unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ModelError, match=r"is no index of safetensors files: KeyError\('weight_map'\)"):
        open_weights(directory)
    save_file({"a": torch.ones(1)}, directory / "one.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(
        ModelError, match=r"one.safetensors' does not hold 'b', which 'model.safetensors.index.json' says"
    ):
        open_weights(directory)
    index.write_text(json.dumps({"weight_map": {"a": "two.safetensors"}}))
    with pytest.raises(ModelError, match=r"two\.safetensors'"):
        open_weights(directory)
