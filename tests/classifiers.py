"""Small sequence-classification models of the kinds that gold scorers are, with random weights and real tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEXTS = ["How do I boil an egg? Seven minutes.", "Human: hello Assistant: sorry, it depends.", "a summary of the post"]
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with one special token and no padding token, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def paired_tokenizer(first: str, end: str) -> PreTrainedTokenizerFast:
    """Byte-level, with special tokens around the texts of a pair, as those of BERT, DeBERTa and BART."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["[PAD]", "[UNK]", first, end]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {end}",
        pair=f"{first} $A {end} $B:1 {end}:1",
        special_tokens=[(first, 2), (end, 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token=first, sep_token=end,
        bos_token=first, eos_token=end, model_max_length=64,
    )  # fmt: skip


def built(kind: str, labels: list[str] | None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    named: dict[str, Any] = {"num_labels": 1}
    if labels:
        named = {"id2label": dict(enumerate(labels)), "label2id": {x: i for i, x in enumerate(labels)}}
    torch.manual_seed(0)
    if kind == "gpt2":
        tokenizer = gpt2_tokenizer()
        end: Any = tokenizer.eos_token_id
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64,
                            bos_token_id=end, eos_token_id=end, **named)  # fmt: skip
        return GPT2ForSequenceClassification(config), tokenizer
    tokenizer = paired_tokenizer(*(("<s>", "</s>") if kind == "bart" else ("[CLS]", "[SEP]")))
    size = len(tokenizer)
    if kind == "bart":
        config = BartConfig(
            vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=None,
            **named,
        )  # fmt: skip
        return BartForSequenceClassification(config), tokenizer
    if kind == "distilbert":
        config = DistilBertConfig(
            vocab_size=size, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=64, **named
        )
        return DistilBertForSequenceClassification(config), tokenizer
    if kind == "deberta":
        config = DebertaV2Config(vocab_size=size, max_position_embeddings=64, relative_attention=True,
                                 pos_att_type=["p2c", "c2p"], **SMALL, **named)  # fmt: skip
        return DebertaV2ForSequenceClassification(config), tokenizer
    config = BertConfig(vocab_size=size, max_position_embeddings=64, **SMALL, **named)
    return BertForSequenceClassification(config), tokenizer


def saved(directory: Path, kind: str, labels: list[str] | None = None) -> Path:
    """A model directory of that kind: "gpt2", "bert", "distilbert", "deberta" or "bart"; one output without labels."""
    model, tokenizer = built(kind, labels)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
