"""The chains are transformers' GPT2LMHeadModel and LlamaForCausalLM, block by block."""

import pytest
import torch
from bert_toys import build, model_state, run
from decoder_toys import FAMILIES, VOCAB, Family, batch
from transformers import GPT2Config

from vpipe.errors import ModelError
from vpipe.model.chain import Chain
from vpipe.model.export import save_shard, write_config, write_index
from vpipe.model.families.gpt import build_gpt_chain
from vpipe.model.loss import sum_parts
from vpipe.model.pretrained import initialise_from

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
TIES = pytest.mark.parametrize("tie_weights", [True, False], ids=["tied", "untied"])


def loaded(family: Family, tie_weights: bool) -> tuple[torch.nn.Module, Chain, list[torch.nn.Module]]:
    reference = family.theirs(tie_weights)
    chain = initialise_from(family.chain(tie_weights), reference.state_dict())
    return reference, chain, build(chain)


@each_family
def test_blocks_are_in_model_order(family):
    chain = family.chain(num_layers=3)
    names = [block.name for block in chain.blocks]
    assert names[:3] == ["embedding", "layer.0.attention", "layer.0.feed_forward"]
    assert names[-2:] == ["layer.2.feed_forward", "head"]
    assert len(chain) == 8
    assert {chain.crossing(cut) for cut in range(1, 8)} == {("hidden",)}
    assert chain.fields_of(0, 7) == ("input_ids",)
    assert chain.fields_of(7, 8) == ("labels",)


@each_family
@TIES
def test_parameters_are_those_of_transformers(family, tie_weights):
    chain, config = family.chain(tie_weights), family.config()
    config.tie_word_embeddings = tie_weights
    with torch.device("meta"):
        reference = family.reference(config)
    words = VOCAB * config.hidden_size
    theirs = sum(parameter.numel() for parameter in reference.parameters())
    assert sum(chain.count_parameters()) - tie_weights * words == theirs
    ours = model_state(chain, build(chain))
    expected = reference.state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


@each_family
@TIES
def test_outputs_are_bit_for_bit_those_of_transformers(family, tie_weights):
    reference, chain, modules = loaded(family, tie_weights)
    reference.eval()
    for module in modules:
        module.eval()
    fields = batch()
    assert torch.equal(run(chain, modules, fields)["logits"], reference(input_ids=fields["input_ids"]).logits)


@each_family
@TIES
def test_loss_and_gradients_are_bit_for_bit_those_of_transformers(family, tie_weights):
    reference, chain, modules = loaded(family, tie_weights)
    fields = batch()
    expected = reference(**fields).loss
    expected.backward()
    loss = sum_parts(chain.loss(run(chain, modules, fields), chain.loss.count(fields, 4), 4))
    loss.backward()
    assert torch.equal(loss, expected)
    gradients: dict[str, torch.Tensor] = {}
    for block, module in zip(chain.blocks, modules, strict=True):
        for name, parameter in module.named_parameters():
            gradients[block.global_name(name)] = parameter.grad
    if tie_weights:
        gradients[family.words] += gradients.pop("lm_head.weight")
    known = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert set(gradients) == set(known)
    assert [name for name, gradient in gradients.items() if not torch.equal(gradient, known[name])] == []


@each_family
@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_microbatches_give_the_loss_of_the_batch(family, num_microbatches):
    _, chain, modules = loaded(family, False)
    fields = batch()
    totals = chain.loss.count(fields, 4)
    assert totals == {"token": 4 * 11 - 3 - 5}
    whole = chain.loss(run(chain, modules, fields), totals, 4)["token"].item()
    shares = 0.0
    for rows in torch.arange(4).chunk(num_microbatches):
        share = {name: tensor[rows] for name, tensor in fields.items()}
        shares += chain.loss(run(chain, modules, share), totals, len(rows))["token"].item()
    assert shares == pytest.approx(whole, rel=1e-6)


@each_family
def test_a_batch_without_targets_has_a_loss_of_zero(family):
    _, chain, modules = loaded(family, False)
    fields = batch() | {"labels": torch.full((4, 12), -100)}
    totals = chain.loss.count(fields, 4)
    loss = sum_parts(chain.loss(run(chain, modules, fields), totals, 4))
    loss.backward()
    assert (totals, loss.item()) == ({"token": 0.0}, 0.0)
    assert all(parameter.grad.isfinite().all() for module in modules for parameter in module.parameters())


@each_family
def test_initial_weights_have_the_distributions_of_transformers(family):
    reference = family.reference(family.config()).state_dict()
    chain = family.chain()
    for name, tensor in model_state(chain, build(chain, seed=3)).items():
        theirs = reference[name]
        assert tensor.mean().item() == pytest.approx(theirs.mean().item(), abs=0.003), name
        assert tensor.std().item() == pytest.approx(theirs.std().item(), rel=0.15), name


@each_family
def test_alike_layers_are_alike(family):
    chain = family.chain(num_layers=3)
    layers = [chain.materialise(index, 0) for index in (1, 3, 5)]
    numbers = [[getattr(part, "layer_idx", None) for part in layer.modules()] for layer in layers]
    assert numbers[0] == numbers[1] == numbers[2]


@each_family
def test_samples_longer_than_the_positions_are_refused_before_the_run(family):
    meta = {name: torch.empty(2, 21, dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}
    with pytest.raises(ModelError, match="samples of 21 tokens do not fit a model with max_position_embeddings 20"):
        family.chain().infer([1], meta)


@each_family
def test_every_cut_is_inferred_without_memory(family):
    chain = family.chain(dropout=0.1)
    meta = {name: tensor.to("meta") for name, tensor in batch().items()}
    specs = chain.infer(range(1, len(chain)), meta)
    kinds = {(spec.name, spec.shape, spec.dtype, spec.requires_grad) for found in specs.values() for spec in found}
    assert kinds == {("hidden", (4, 12, 32), torch.float32, True)}


@each_family
@TIES
def test_transformers_loads_what_the_stages_wrote(family, tie_weights, tmp_path):
    chain, config = family.chain(tie_weights), family.config()
    modules = [module.eval() for module in build(chain, seed=9)]
    for stage, blocks in enumerate((range(2), range(2, len(chain)))):
        save_shard(tmp_path, chain, {block: modules[block].state_dict() for block in blocks}, stage, 2)
    write_index(tmp_path, chain, 2)
    write_config(tmp_path, config, tie_weights=tie_weights)
    model, loading = family.reference.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    fields = batch()
    logits = model.eval()(input_ids=fields["input_ids"]).logits
    assert torch.equal(run(chain, modules, fields)["logits"], logits)


def test_cross_attention_is_refused():
    with pytest.raises(ModelError, match="has cross attention"):
        build_gpt_chain(GPT2Config(add_cross_attention=True), tie_weights=False)
