"""The chain is transformers' BertForPreTraining, block by block."""

import pytest
import torch
from bert_toys import VOCAB, batch, build, model_state, run, theirs, toy_chain, toy_config
from transformers import BertConfig, BertForPreTraining

from vpipe.errors import ModelError
from vpipe.model.chain import Chain
from vpipe.model.families.bert import BERT_FIELDS, build_bert_chain
from vpipe.model.families.bert_config import build_bert_config
from vpipe.model.loss import sum_parts
from vpipe.model.pretrained import initialise_from

TIES = pytest.mark.parametrize("tie_weights", [True, False], ids=["tied", "untied"])


def loaded(tie_weights: bool) -> tuple[BertForPreTraining, Chain, list[torch.nn.Module]]:
    reference = theirs(tie_weights)
    chain = initialise_from(toy_chain(tie_weights), reference.state_dict())
    return reference, chain, build(chain)


def test_a_chain_of_24_layers_has_49_blocks_in_model_order():
    chain = build_bert_chain(build_bert_config("large"), tie_weights=False)
    names = [block.name for block in chain.blocks]
    assert len(chain) == 49
    assert names[:4] == ["embedding", "layer.0.attention", "layer.0.feed_forward", "layer.1.attention"]
    assert names[-2:] == ["layer.23.attention", "layer.23.feed_forward"]
    assert {chain.crossing(cut) for cut in range(1, 49)} == {("hidden",)}


def test_only_the_stages_that_need_a_field_read_it():
    chain = toy_chain()
    assert chain.fields_of(0, 1) == ("input_ids", "token_type_ids")
    assert chain.fields_of(1, 2) == ("attention_mask",)
    assert chain.fields_of(2, 3) == ()
    assert chain.fields_of(4, 5) == ("labels", "next_sentence_label")


@pytest.mark.parametrize(("tie_weights", "num_parameters"), [(True, 336_226_108), (False, 367_480_636)])
def test_bert_large_has_the_parameters_of_transformers(tie_weights, num_parameters):
    config = build_bert_config("large")
    chain = build_bert_chain(config, tie_weights=tie_weights)
    words, bias = config.vocab_size * config.hidden_size, config.vocab_size
    assert sum(chain.count_parameters()) - tie_weights * words == num_parameters
    with torch.device("meta"):
        config.tie_word_embeddings = tie_weights
        reference = sum(parameter.numel() for parameter in BertForPreTraining(config).parameters())
    # Untied, transformers holds a second output bias that nothing reads.
    assert reference - (not tie_weights) * bias == num_parameters


@TIES
def test_names_are_those_of_transformers(tie_weights):
    chain = toy_chain(tie_weights)
    reference = theirs(tie_weights).state_dict()
    ours = model_state(chain, build(chain))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: reference[name].shape for name in ours}
    assert set(reference) - set(ours) == {f"cls.predictions.{'decoder.' * tie_weights}bias"}


@TIES
@pytest.mark.parametrize("padded", [True, False])
def test_outputs_are_bit_for_bit_those_of_transformers(tie_weights, padded):
    reference, chain, modules = loaded(tie_weights)
    reference.eval()
    fields = batch(targets=1.0, padded=padded)
    expected = reference(**fields)
    for module in modules:
        module.eval()
    values = run(chain, modules, fields)
    assert torch.equal(values["mlm_logits"], expected.prediction_logits.flatten(0, 1))
    assert torch.equal(values["nsp_logits"], expected.seq_relationship_logits)


@TIES
@pytest.mark.parametrize("targets", [1.0, 0.2])
def test_loss_and_gradients_are_those_of_transformers(tie_weights, targets):
    reference, chain, modules = loaded(tie_weights)
    fields = batch(targets=targets)
    expected = reference(**fields).loss
    expected.backward()
    loss = sum_parts(chain.loss(run(chain, modules, fields), chain.loss.count(fields, 4), 4))
    loss.backward()
    # Bit for bit where every token is a target. Otherwise our last matrix products leave the other tokens' zero rows
    # out, so that their sums are rounded in another order: a few units in the last place.
    tolerance = {"rtol": 0, "atol": 0} if targets == 1 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(loss, expected, **tolerance)
    gradients: dict[str, torch.Tensor] = {}
    for block, module in zip(chain.blocks, modules, strict=True):
        for name, parameter in module.named_parameters():
            gradients[block.global_name(name)] = parameter.grad
    if tie_weights:
        gradients["bert.embeddings.word_embeddings.weight"] += gradients.pop("cls.predictions.decoder.weight")
    known = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    assert set(gradients) == set(known)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, known[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_microbatches_give_the_loss_of_the_batch(num_microbatches):
    _, chain, modules = loaded(tie_weights=False)
    fields = batch()
    totals = chain.loss.count(fields, 4)
    whole = chain.loss(run(chain, modules, fields), totals, 4)
    parts = {"mlm": 0.0, "nsp": 0.0}
    for rows in torch.arange(4).chunk(num_microbatches):
        share = {name: tensor[rows] for name, tensor in fields.items()}
        for name, part in chain.loss(run(chain, modules, share), totals, len(rows)).items():
            parts[name] += part.item()
    assert parts == pytest.approx({name: part.item() for name, part in whole.items()}, rel=1e-6)


def test_padding_does_not_change_what_is_not_padded():
    _, chain, modules = loaded(tie_weights=False)
    fields = batch(targets=0.3)
    fields["labels"][fields["attention_mask"] == 0] = -100
    before = run(chain, modules, fields)["mlm_logits"]
    fields["input_ids"][fields["attention_mask"] == 0] = 3
    assert torch.equal(run(chain, modules, fields)["mlm_logits"], before)


def test_small_integers_and_booleans_serve_as_fields():
    _, chain, modules = loaded(tie_weights=False)
    fields = batch()
    small = {name: tensor.to(torch.int32) for name, tensor in fields.items()}
    small |= {"attention_mask": fields["attention_mask"].bool(), "token_type_ids": fields["token_type_ids"].byte()}
    totals = chain.loss.count(small, 4)
    assert totals == chain.loss.count(fields, 4)
    wide, narrow = (chain.loss(run(chain, modules, given), totals, 4) for given in (fields, small))
    assert sum_parts(wide) == sum_parts(narrow)


def test_dropout_depends_on_the_random_state_only():
    chain = toy_chain(dropout=0.3)
    modules, fields, outputs = build(chain), batch(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(run(chain, modules, fields)["nsp_logits"])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_every_cut_is_inferred_without_memory():
    chain = toy_chain(dropout=0.1)
    meta = {name: tensor.to("meta") for name, tensor in batch().items()}
    specs = chain.infer(range(1, len(chain)), meta)
    kinds = {(spec.name, spec.shape, spec.dtype, spec.requires_grad) for found in specs.values() for spec in found}
    assert kinds == {("hidden", (4, 12, 32), torch.float32, True)}


def test_initial_weights_have_the_distributions_of_transformers():
    modules = build(toy_chain(), seed=3)
    for module in modules:
        for name, parameter in module.named_parameters():
            if "LayerNorm.weight" in name:
                assert (parameter == 1).all(), name
            elif name.endswith("bias"):
                assert (parameter == 0).all(), name
            elif parameter.numel() > 500:
                assert abs(parameter.mean().item()) < 0.003, name
                assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            else:
                assert 0.01 < parameter.std().item() < 0.03, name
    embedding = modules[0].embeddings.word_embeddings
    assert embedding.padding_idx == 0
    assert (embedding.weight[0] == 0).all()


def test_initial_weights_depend_on_the_seed_and_the_block():
    chain = toy_chain()
    attentions = [
        chain.materialise(index, seed).attention.self.query.weight for index, seed in [(1, 0), (3, 0), (1, 1)]
    ]
    assert not torch.equal(attentions[0], attentions[1])
    assert not torch.equal(attentions[0], attentions[2])
    assert torch.equal(attentions[0], toy_chain(num_layers=7).materialise(1, 0).attention.self.query.weight)


def test_tied_weights_start_equal_and_untied_ones_do_not():
    for tie_weights in (True, False):
        chain = toy_chain(tie_weights)
        words = chain.materialise(0, 5).embeddings.word_embeddings.weight
        assert torch.equal(chain.materialise(4, 5).cls.predictions.decoder.weight, words) == tie_weights
        assert bool(chain.tied) == tie_weights


def test_the_config_is_not_changed():
    config = toy_config()
    before, attention = config.to_dict(), config._attn_implementation
    build_bert_chain(config, tie_weights=True)
    assert config.to_dict() == before
    assert config._attn_implementation == attention


def test_samples_longer_than_the_positions_are_refused_before_the_run():
    meta = {name: torch.empty(2, 21, dtype=torch.int64, device="meta") for name in BERT_FIELDS}
    with pytest.raises(ModelError, match="samples of 21 tokens do not fit a model with max_position_embeddings 20"):
        toy_chain().infer([1], meta)


def test_a_decoder_is_refused():
    with pytest.raises(ModelError, match="needs is_decoder=False"):
        build_bert_chain(BertConfig(is_decoder=True), tie_weights=False)


def test_a_batch_without_targets_has_a_loss():
    _, chain, modules = loaded(tie_weights=False)
    fields = batch() | {"labels": torch.full((4, 12), -100)}
    totals = chain.loss.count(fields, 4)
    values = run(chain, modules, fields)
    parts = chain.loss(values, totals, 4)
    sum_parts(parts).backward()
    assert totals == {"mlm": 0.0, "nsp": 4.0}
    assert values["mlm_logits"].shape == (0, VOCAB)
    assert parts["mlm"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for module in modules for p in module.parameters())


def test_the_loss_names_its_parts_in_their_order():
    chain = toy_chain()
    assert chain.loss.parts == ("mlm", "nsp") == tuple(chain.loss.count(batch(), 4))
