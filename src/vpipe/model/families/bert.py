"""BERT for pre-training as a chain of 2 * num_layers + 1 blocks: embedding, then attention and feed-forward by layer.

The last block also holds the pooler and the pre-training heads. Its outputs, losses and `state_dict` names are those of
transformers' `BertForPreTraining`, whose parts the blocks are made of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert import modeling_bert as bert

from vpipe.errors import ModelError
from vpipe.model.chain import Block, Chain, ParameterRef
from vpipe.model.families.bert_loss import BertLoss, target_positions

__all__ = ["BERT_FIELDS", "build_bert_chain"]

BERT_FIELDS = ("input_ids", "token_type_ids", "attention_mask", "labels", "next_sentence_label")


def build_bert_chain(config: BertConfig, *, tie_weights: bool) -> Chain:
    """Return BERT with its masked-token and next-sentence losses, of any size, over the batch fields `BERT_FIELDS`.

    `input_ids`, `token_type_ids`, `attention_mask` (1 or True where there is a token) and `labels` (-100 where there is
    no target) have the shape (samples, tokens), `next_sentence_label` (samples,). With `tie_weights` the output matrix
    is the word embedding; the config's own `tie_word_embeddings` is not looked at.

    Raises:
        ModelError: the config is that of a decoder.
    """
    if config.is_decoder or config.add_cross_attention:
        raise ModelError("the config is that of a decoder; BERT's pre-training needs is_decoder=False")
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    blocks = [_block(config, "embedding", _Embedding, ("input_ids", "token_type_ids"), (("", "bert."),))]
    for layer in range(config.num_hidden_layers):
        name, keys = f"layer.{layer}", (("", f"bert.encoder.layer.{layer}."),)
        blocks.append(_block(config, f"{name}.attention", _Attention, ("hidden", "attention_mask"), keys))
        if layer < config.num_hidden_layers - 1:
            blocks.append(_block(config, f"{name}.feed_forward", _FeedForward, ("hidden",), keys))
        else:
            outputs = ("mlm_logits", "nsp_logits")
            heads = (*_head_keys(tie_weights), *keys)
            blocks.append(_block(config, f"{name}.feed_forward", _Head, ("hidden", "labels"), heads, outputs))
    words = ParameterRef(0, "embeddings.word_embeddings.weight")
    output = ParameterRef(len(blocks) - 1, "cls.predictions.decoder.weight")
    return Chain(tuple(blocks), BERT_FIELDS, BertLoss(), ((words, output),) if tie_weights else ())


def _head_keys(tie_weights: bool) -> tuple[tuple[str, str], ...]:
    # Where transformers ties the output matrix it ties its bias too, and keeps that under the other of its two names.
    bias = (("cls.predictions.decoder.bias", "cls.predictions.bias"),) if tie_weights else ()
    return (*bias, ("cls.", "cls."), ("pooler.", "bert.pooler."))


def _block(
    config: BertConfig,
    name: str,
    make: Callable[[BertConfig], nn.Module],
    inputs: tuple[str, ...],
    keys: tuple[tuple[str, str], ...],
    outputs: tuple[str, ...] = ("hidden",),
) -> Block:
    return Block(name, partial(_build, make, config), inputs, outputs, keys)


def _build(make: Callable[[BertConfig], nn.Module], config: BertConfig) -> nn.Module:
    device = torch.get_default_device()
    # Made without memory, so that the layers' own initialisation, which is not BERT's, costs nothing.
    with torch.device("meta"):
        module = make(config)
    if device.type != "meta":
        _initialise(module.to_empty(device=device), config.initializer_range)
    return module


@torch.no_grad()
def _initialise(module: nn.Module, std: float) -> None:
    """Draw initial weights from the distributions of transformers' `BertPreTrainedModel`."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(0.0, std)
            part.bias.zero_()
        elif isinstance(part, nn.Embedding):
            part.weight.normal_(0.0, std)
            if part.padding_idx is not None:
                part.weight[part.padding_idx].zero_()
        elif isinstance(part, nn.LayerNorm):
            part.weight.fill_(1.0)
            part.bias.zero_()


class _Embedding(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = bert.BertEmbeddings(config)
        # Positions are made here: a buffer would have to be filled again after every move from the meta device.
        del self.embeddings.position_ids, self.embeddings.token_type_ids
        self.max_tokens: int = config.max_position_embeddings

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        num_tokens = input_ids.shape[1]
        if num_tokens > self.max_tokens:
            raise ModelError(
                f"samples of {num_tokens} tokens do not fit a model with max_position_embeddings {self.max_tokens}; "
                "raise it, or prepare shorter samples"
            )
        positions = torch.arange(num_tokens, device=input_ids.device).unsqueeze(0)
        hidden: Tensor = self.embeddings(input_ids.long(), token_type_ids.long(), positions)
        return hidden


class _Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = bert.BertAttention(config)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        # The mask is used even where it is all ones, which gives the same bits: to look would make a GPU wait.
        keep = attention_mask.bool()[:, None, None, :]
        attended: Tensor = self.attention(hidden, attention_mask=keep)[0]
        return attended


class _FeedForward(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.intermediate = bert.BertIntermediate(config)
        self.output = bert.BertOutput(config)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.output(self.intermediate(hidden), hidden)
        return result


class _Head(nn.Module):
    """The last layer's feed-forward part with the heads, which score the vocabulary only where there is a target."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.intermediate = bert.BertIntermediate(config)
        self.output = bert.BertOutput(config)
        self.pooler = bert.BertPooler(config)
        self.cls = bert.BertPreTrainingHeads(config)
        # The decoder's bias under a second name, where it is tied; otherwise a weight that nothing reads.
        del self.cls.predictions.bias

    def forward(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.output(self.intermediate(hidden), hidden)
        targets = hidden.flatten(0, 1).index_select(0, target_positions(labels))
        mlm_logits, nsp_logits = self.cls(targets, self.pooler(hidden))
        return mlm_logits, nsp_logits
