"""Model configs, loading from directories in the hub's layout, LoRA, and the reference as a snapshot."""

from __future__ import annotations

import functools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chats import chat_tokenizer
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from peft import PeftConfig, PeftModel
from policies import asking
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mopo_cli.base.errors import UserError
from mopo_cli.commands.export import write_merged
from mopo_cli.config.compose import compose, typed
from mopo_cli.config.schema import LoraConfig, ModelConfig, SamplingConfig, TokenizerConfig, TrainConfig
from mopo_cli.data.batches import Collator
from mopo_cli.data.table import TokenRow
from mopo_cli.evaluation import loading
from mopo_cli.evaluation.entrants import Entrant
from mopo_cli.models import hub as models_hub
from mopo_cli.models import load
from mopo_cli.models.load import load_policy
from mopo_cli.models.logprobs import all_logps, can_pack, response_logps
from mopo_cli.models.policy import Policy
from mopo_cli.models.tokenizers import load_tokenizer, train_tokenizer

torch.set_num_threads(1)  # threads only get in each other's way on tiny models

TEXTS = ["the cat sat on the mat.", "a dog ran to the red house!", "is the sky blue today?"] * 8
NUMBERS = [str(i) for i in range(9999)]
PARAMETERS = {
    "opt125m": 125_239_296,
    "opt350m": 331_196_416,
    "opt1.3b": 1_315_758_080,
    "llama3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,  # the output head is tied to the embeddings
    "smollm2-135m": 134_515_008,
}
SHAPE = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 64}
ROTARY = {"intermediate_size": 48, "num_key_value_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "dropout": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "llama": ROTARY,
    "qwen3": {**ROTARY, "head_dim": 8, "tie_word_embeddings": True},
}
ROWS = [TokenRow([5, 6, 7], [[8, 9], [10, 11, 1]]), TokenRow([12, 13], [[14, 15, 1], [16, 1]])]
COLLATE = Collator(pad=0)


@functools.cache
def model_config(name: str, *overrides: str) -> ModelConfig:
    config: TrainConfig = typed(compose("train", [f"model={name}", *overrides]), TrainConfig)
    return config.model


def tokenizer_of(size: int = 300) -> Any:
    return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=size))


def save_hub_layout(directory: Path, model_type: str = "llama", **changes: Any) -> nn.Module:
    """What `hf download` leaves: config, weights, tokenizer. Returns the model that was saved."""
    tokenizer = tokenizer_of()
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 1}
    torch.manual_seed(3)
    built = AutoConfig.for_model(model_type, **{**SHAPE, **special, **TINY[model_type], **changes})
    model = AutoModelForCausalLM.from_config(built)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def local(path: Path | str, **changes: Any) -> ModelConfig:
    return replace(model_config("local"), **{"path": str(path), "max_length": 64, **changes})


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in the hub's layout; tests that break it work on a copy."""
    directory = tmp_path_factory.mktemp("hub") / "llama"
    save_hub_layout(directory)
    return directory


@pytest.fixture
def copy(hub: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hub, tmp_path / "copy"))


def message(config: ModelConfig) -> str:
    """What the user is told when this model is loaded."""
    with pytest.raises(UserError) as caught:
        load_policy(config, load_tokenizer(config, TEXTS), seed=0)
    return str(caught.value)


# --------------------------------------------------------------------------------------------- conf/model


@pytest.mark.parametrize("name", ["tiny", "local", *PARAMETERS])
def test_every_option_is_complete_and_typed(name):
    composed = compose("train", [f"model={name}"]).model
    assert set(composed) == set(compose("train", ["model=tiny"]).model)
    config = model_config(name)
    assert config.name == name
    assert all(not isinstance(v, str) or k in ("model_type", "hidden_act", "activation_function")
               for k, v in config.architecture.items())  # fmt: skip
    assert config.max_length <= config.architecture.get("max_position_embeddings", config.max_length)


@pytest.mark.parametrize("name", PARAMETERS)
def test_architecture_alone_builds_the_published_model(name):
    config = model_config(name, "model.init=random")
    tokenizer = load_tokenizer(config, TEXTS)
    with torch.device("meta"):
        model = load_policy(replace(config, lora=LoraConfig()), tokenizer, seed=0)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.dtype == getattr(torch, config.dtype)
    drops = {k: v for k, v in model.config.to_dict().items() if "drop" in k}
    assert not any(drops.values()), drops


def test_llama_trains_adapters_of_every_linear_layer():
    config = model_config("llama3.1-8b", "model.init=random")
    with torch.device("meta"):
        model = load_policy(config, load_tokenizer(config, TEXTS), seed=0)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    h, f, kv, r = 4096, 14336, 1024, 16
    assert trainable == 32 * r * (2 * (h + h) + 2 * (h + kv) + 3 * (h + f))
    assert model.is_gradient_checkpointing


def test_chat_models_template_every_prompt():
    assert {n: model_config(n).chat_template for n in ("llama3.1-8b", "qwen3-0.6b")} == {
        "llama3.1-8b": "always",
        "qwen3-0.6b": "always",
    }
    assert {model_config(n).chat_template for n in ("opt125m", "opt350m", "opt1.3b", "tiny", "local")} == {"auto"}


def test_local_asks_for_a_path():
    assert "Set model.path=DIR" in message(model_config("local"))


# --------------------------------------------------------------------------------------------- random weights


def test_random_weights_come_from_the_seed_alone():
    config = replace(model_config("tiny"), tokenizer=TokenizerConfig(train=True, vocab_size=300))
    tokenizer = load_tokenizer(config, TEXTS)
    torch.manual_seed(11)
    first = load_policy(config, tokenizer, seed=0)
    after = torch.rand(3)
    torch.manual_seed(12)
    again, other = load_policy(config, tokenizer, seed=0), load_policy(config, tokenizer, seed=1)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    torch.manual_seed(11)
    assert torch.equal(after, torch.rand(3)), "the global generator was used"
    assert first.get_input_embeddings().num_embeddings == 8 * -(-len(tokenizer) // 8)


def test_tokenizer_is_trained_within_the_architectures_vocabulary():
    config = model_config("opt125m", "model.init=random")
    assert 300 < len(load_tokenizer(config, NUMBERS)) <= 4096
    few = replace(config, architecture={**config.architecture, "vocab_size": 270})
    assert len(load_tokenizer(few, NUMBERS)) == 270
    assert load_tokenizer(few, NUMBERS).model_max_length == few.max_length


def test_random_weights_with_a_local_tokenizer_keep_it(hub, copy):
    config = local(hub, init="random")
    assert load_tokenizer(config, ["other"]).get_vocab() == tokenizer_of().get_vocab()
    model = load_policy(config, load_tokenizer(config, []), seed=0)
    assert model.config.hidden_size == 32
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    assert len(load_tokenizer(local(copy, init="random"), NUMBERS)) == 320  # as many as the model has embeddings
    described = local(copy, init="random", architecture={"model_type": "gpt2", "vocab_size": 280, "n_embd": 24})
    tokenizer = load_tokenizer(described, NUMBERS)
    assert len(tokenizer) == 280
    architecture = {**described.architecture, "n_head": 2, "n_layer": 1}
    assert load_policy(replace(described, architecture=architecture), tokenizer, 0).config.n_embd == 24


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "lama"}, "model.architecture.model_type=lama: transformers knows no such model type"),
        ({"model_type": None}, "model.architecture.model_type=None"),
        ({"hiden_size": 8}, "model.architecture.hiden_size: a llama has no such value (did you mean hidden_size?)"),
        ({"num_attention_heads": 3}, "model.architecture: "),
        ({"hidden_size": "big"}, "model.architecture: "),
    ],
)
def test_mistakes_in_an_architecture_are_named(change, told):
    config = model_config("tiny")
    assert told in message(replace(config, architecture={**config.architecture, **change}))


def test_training_a_tokenizer_for_pretrained_weights_is_refused(hub):
    told = message(local(hub, tokenizer=TokenizerConfig(train=True)))
    assert "model.tokenizer.train=true needs model.init=random" in told


# --------------------------------------------------------------------------------------------- local directories


@pytest.mark.parametrize("model_type", TINY)
def test_a_directory_in_the_hubs_layout_loads(model_type, tmp_path):
    saved = save_hub_layout(tmp_path, model_type).eval()
    config = local(tmp_path)
    tokenizer = load_tokenizer(config, [])
    model = load_policy(config, tokenizer, seed=0)
    assert tokenizer.get_vocab() == tokenizer_of().get_vocab()
    ids = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    torch.testing.assert_close(model.eval()(ids).logits, saved(ids).logits)
    assert model.config.use_cache is False
    assert can_pack(model)


@pytest.mark.parametrize("model_type", ["opt", "gpt2"])
def test_dropout_of_a_checkpoint_is_off(model_type, tmp_path):
    save_hub_layout(tmp_path, model_type)
    config = local(tmp_path)
    model = load_policy(config, load_tokenizer(config, []), seed=0).train()
    batch = COLLATE(ROWS)
    assert torch.equal(response_logps(model, batch), response_logps(model, batch))


def test_a_checkpoints_generation_settings_do_not_bend_samples(copy):
    GenerationConfig(do_sample=True, temperature=0.6, repetition_penalty=1.3, eos_token_id=[1, 2]).save_pretrained(copy)
    config = local(copy)
    tokenizer = load_tokenizer(config, [])
    settings = load_policy(config, tokenizer, seed=0).generation_config
    assert settings is not None
    assert settings.repetition_penalty in (None, 1.0)
    assert settings.temperature in (None, 1.0)
    assert settings.eos_token_id == tokenizer.eos_token_id


def test_every_end_of_turn_ends_samples_and_is_saved(tmp_path):
    tokenizer = chat_tokenizer("qwen base")
    save_hub_layout(tmp_path / "hub")
    tokenizer.save_pretrained(tmp_path / "hub")
    turn_end, turn_start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    GenerationConfig(eos_token_id=[turn_start, 7]).save_pretrained(tmp_path / "hub")
    config = local(tmp_path / "hub")
    policy = Policy.load(config, load_tokenizer(config, []), seed=0)
    ends = [tokenizer.eos_token_id, turn_end, turn_start]  # 7 is a letter
    assert policy.encoder.ends == set(ends)
    prompt = policy.encoder.prompt_ids([{"role": "user", "content": "x"}])
    (drawn,) = policy.sample([prompt], 300, SamplingConfig(max_new_tokens=30, batch_size=300), 0)
    assert {d.ids[-1] for d in drawn} > set(ends)
    assert not any(end in d.ids[:-1] or "<|im" in d.text for d in drawn for end in ends)
    policy.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"] == ends
    assert Policy.load(local(tmp_path / "saved"), policy.tokenizer, seed=0).encoder.ends == set(ends)
    asked = loading.load_policy(config, loading.plain_encoder(config), 0)
    assert asked.encoder.conditioned("brief").ends == set(ends)


def test_a_tokenizer_without_padding_pads_with_the_end(copy):
    plain = json.loads((copy / "tokenizer_config.json").read_text())
    del plain["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(plain))
    tokenizer = load_tokenizer(local(copy), [])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_template_file_replaces_the_tokenizers(hub, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", encoding="utf-8")
    for config in (local(hub), replace(model_config("tiny"))):
        tokenizer = load_tokenizer(replace(config, chat_template=str(template)), TEXTS)
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert rendered == "<user>hi"
    assert "must be auto, always or a Jinja file" in message(local(hub, chat_template="allways"))


def test_home_and_relative_paths(hub, monkeypatch):
    monkeypatch.setenv("HOME", str(hub.parent))
    assert load_tokenizer(local("~/llama"), []).eos_token_id is not None
    monkeypatch.chdir(hub.parent)
    assert load_policy(local("llama"), tokenizer_of(), 0).config.hidden_size == 32


# --------------------------------------------------------------------------------------------- what goes wrong


def test_a_path_that_is_no_model(tmp_path):
    assert message(local(tmp_path / "none")) == f"model.path={tmp_path / 'none'}: no such directory"
    assert "not a model directory (it has no config.json)" in message(local(tmp_path))


def test_a_torn_config(copy):
    (copy / "config.json").write_text('{"model_type": "lla', encoding="utf-8")
    assert "not a valid JSON file" in message(local(copy))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"a": 1}, "model_type"),
        ({"model_type": "zork"}, "zork"),
        ({"model_type": "bert"}, "no causal (decoder-only) language model"),
        ({"model_type": "t5"}, "no causal (decoder-only) language model"),
    ],
)
def test_a_config_of_something_else(copy, content, told):
    (copy / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.path=") as caught:
        load_policy(local(copy), tokenizer_of(), 0)
    assert told in str(caught.value)


def test_no_tokenizer_in_the_directory(copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    assert "it holds no tokenizer" in message(local(copy))


def test_a_torn_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{", encoding="utf-8")
    assert f"model.path={copy}: cannot load its tokenizer" in message(local(copy))


def test_a_tokenizer_without_an_end(copy):
    values = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "eos_token"}))
    assert "its tokenizer has no end-of-sequence token" in message(local(copy))


def test_weights_missing_torn_or_of_another_model(copy, tmp_path):
    other = save_hub_layout(tmp_path / "deeper", num_hidden_layers=3)
    shutil.copy(tmp_path / "deeper" / "config.json", copy / "config.json")
    assert "9 weights are not in its files: model.layers.2." in message(local(copy))
    save_hub_layout(copy, intermediate_size=40)
    shutil.copy(tmp_path / "deeper" / "config.json", copy / "config.json")
    assert f"model.path={copy}: cannot load its model" in message(local(copy))
    (copy / "model.safetensors").write_bytes((tmp_path / "deeper" / "model.safetensors").read_bytes()[:2000])
    assert f"model.path={copy}: cannot load its model" in message(local(copy))
    (copy / "model.safetensors").unlink()
    assert "it holds no weights" in message(local(copy))
    assert other is not None


def test_context_and_vocabulary_must_hold_the_data(hub):
    assert message(local(hub, max_length=65)) == "model.max_length=65: the model has 64 positions at most"
    with pytest.raises(UserError, match="the tokenizer has 330 tokens, the model only 320 embeddings"):
        load_policy(local(hub), train_tokenizer(NUMBERS, TokenizerConfig(vocab_size=330)), 0)


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_an_unknown_attention(hub, init):
    told = message(local(hub, attention="flashy", init=init))
    assert "flashy" in told
    assert "sdpa" in told


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        (LoraConfig(r=-1), "model.lora.r=-1: must be 0"),
        (LoraConfig(r=8, quantise="8bit"), "model.lora.quantise=8bit: must be 4bit or null"),
        (LoraConfig(quantise="4bit"), "4-bit weights cannot be trained; set model.lora.r"),
        (LoraConfig(r=8, target_modules=["query"]), "model.lora.target_modules=['query']: "),
    ],
)
def test_mistakes_in_lora(hub, lora, told):
    assert told in message(local(hub, lora=lora))


def test_quantising_needs_its_library(hub, monkeypatch):
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    assert "needs bitsandbytes" in message(local(hub, lora=LoraConfig(r=8, quantise="4bit")))


# --------------------------------------------------------------------------------------------- the hub


def test_no_network_is_told_at_once(monkeypatch):
    monkeypatch.setattr(models_hub, "hub_answers", lambda: False)
    started = time.monotonic()
    for task in (lambda c: load_tokenizer(c, []), lambda c: load_policy(c, tokenizer_of(), 0)):
        with pytest.raises(UserError) as caught:
            task(local("nobody/no-such-model"))
        assert "the hub does not answer" in str(caught.value)
        assert "hf download nobody/no-such-model --local-dir DIR" in str(caught.value)
    assert time.monotonic() - started < 5.0


def test_whether_the_hub_answers(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(models_hub, "get_session", lambda: SimpleNamespace(head=refuse))
    assert not models_hub.hub_answers.__wrapped__()
    monkeypatch.setattr(models_hub, "get_session", lambda: SimpleNamespace(head=lambda *a, **k: None))
    assert models_hub.hub_answers.__wrapped__()
    monkeypatch.setattr(models_hub.constants, "HF_HUB_OFFLINE", True)
    assert not models_hub.hub_answers.__wrapped__()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (GatedRepoError, "a gated model. Accept its licence at https://huggingface.co/some/model"),
        (RepositoryNotFoundError, "no such model on the hub, and no such directory here"),
        (RevisionNotFoundError, "model.revision=v9: some/model has no such revision"),
        (ValueError, "cannot load the tokenizer from the hub: "),
    ],
)
def test_what_the_hub_answers(monkeypatch, kind, told):
    def fail(*args: Any, **kwargs: Any) -> None:
        try:
            raise kind.__new__(kind)
        except kind as cause:
            raise OSError("You are trying to access something") from cause

    monkeypatch.setattr(models_hub, "hub_answers", lambda: True)
    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", fail)
    assert told in message(local("some/model", revision="v9"))


def test_custom_code_needs_consent(monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Please pass the argument `trust_remote_code=True` to allow custom code to be run.")

    monkeypatch.setattr(models_hub, "hub_answers", lambda: True)
    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", fail)
    assert "model.trust_remote_code=true" in message(local("some/model"))


# --------------------------------------------------------------------------------------------- LoRA and the reference


def policy_of(hub: Path, **lora: Any) -> nn.Module:
    config = local(hub, lora=LoraConfig(**lora))
    return load_policy(config, load_tokenizer(config, []), seed=0)


def shake(policy: nn.Module, seed: int) -> None:
    """A training step's worth of change to what is trainable."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))


def logps(policy: nn.Module) -> torch.Tensor:
    return torch.cat(all_logps(policy, ROWS, COLLATE))


def test_adapters_come_from_the_seed_alone(hub):
    torch.manual_seed(1)
    first = asking(policy_of(hub, r=4)).snapshot()
    torch.manual_seed(2)
    again = asking(policy_of(hub, r=4)).snapshot()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_lora_trains_adapters_only_and_starts_at_the_base(hub):
    policy = policy_of(hub, r=4, alpha=8)
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 2 * 7 * 2  # A and B of seven linear layers in each of two blocks
    torch.testing.assert_close(logps(policy), logps(policy_of(hub)))
    response_logps(policy, COLLATE(ROWS)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in policy.parameters())


def test_gradients_reach_adapters_through_checkpointed_layers(hub):
    grads = []
    for checkpointing in (False, True):
        config = local(hub, lora=LoraConfig(r=4), gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        policy = load_policy(config, load_tokenizer(config, []), seed=0).train()
        shake(policy, 0)
        response_logps(policy, COLLATE(ROWS)).sum().backward()
        grads.append([p.grad for p in policy.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("lora", [{"r": 0}, {"r": 4}])
def test_the_snapshot_is_the_policy_as_it_was(hub, lora):
    policy = policy_of(hub, **lora)
    shake(policy, 1)
    then, weights = logps(policy), asking(policy).snapshot()
    assert set(weights) == {name for name, p in policy.named_parameters() if p.requires_grad}
    shake(policy, 2)
    now = logps(policy)
    assert not torch.allclose(then, now, atol=0.1)
    torch.testing.assert_close(torch.cat(asking(policy).logps_under(weights, ROWS)), then)
    assert torch.equal(logps(policy), now)
    with asking(policy).swapped(weights):
        torch.testing.assert_close(logps(policy), then)
    assert torch.equal(logps(policy), now)


def test_the_policy_comes_back_after_a_failure(hub):
    policy = policy_of(hub, r=4)
    weights = asking(policy).snapshot()
    shake(policy, 3)
    now = logps(policy)
    with pytest.raises(RuntimeError, match="boom"), asking(policy).swapped(weights):
        raise RuntimeError("boom")
    assert torch.equal(logps(policy), now)


def test_training_goes_on_from_its_own_weights(hub):
    policy = policy_of(hub)
    weights = asking(policy).snapshot()
    optimiser = torch.optim.SGD(policy.parameters(), lr=0.1)
    before = logps(policy)
    asking(policy).logps_under(weights, ROWS)
    (-response_logps(policy, COLLATE(ROWS)).sum()).backward()
    optimiser.step()
    assert logps(policy).sum() > before.sum()
    torch.testing.assert_close(torch.cat(asking(policy).logps_under(weights, ROWS)), before)


def test_an_adapter_directory_is_merged_into_its_base(hub, tmp_path):
    policy = policy_of(hub, r=4)
    shake(policy, 4)
    policy.save_pretrained(tmp_path)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(hub).save_pretrained(tmp_path)
    config = local(tmp_path)
    merged = load_policy(config, load_tokenizer(config, []), seed=0)
    assert all(p.requires_grad for p in merged.parameters())
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logps(merged), logps(policy), atol=1e-4, rtol=1e-4)
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**record, "base_model_name_or_path": None}))
    assert "an adapter whose base model is not known" in message(config)


# --------------------------------------------------------------------------------------------- what is saved
def trained(directory: Path, config: ModelConfig, seed: int) -> Policy:
    """A policy after a step's worth of change, saved."""
    policy = Policy.load(config, load_tokenizer(config, []), seed=0)
    shake(policy.model, seed)
    policy.save(directory)
    return policy


def logits_of_others(directory: Path) -> torch.Tensor:
    """What transformers and peft alone make of a directory, on the base model that its record names."""
    if not (directory / "adapter_config.json").is_file():
        return logits(AutoModelForCausalLM.from_pretrained(directory))
    base = PeftConfig.from_pretrained(str(directory)).base_model_name_or_path
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base)), str(directory)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 17)[None]).logits


@pytest.mark.parametrize(
    ("below", "lora"),
    [
        (None, {}),
        (None, {"r": 4, "alpha": 6}),
        ({"r": 4, "alpha": 8}, {}),
        ({"r": 4, "alpha": 8}, {"r": 3, "alpha": 7.5}),
        ({"r": 2, "alpha": 8, "target_modules": ["q_proj", "down_proj"]}, {"r": 4, "alpha": 8}),
    ],
    ids=["full", "LoRA", "merged", "LoRA on LoRA", "LoRA on fewer layers"],
)
def test_what_is_saved_is_what_was_trained(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: dict[str, Any] | None, lora: dict[str, Any]
):
    monkeypatch.chdir(hub.parent)
    config = local(hub.name, lora=LoraConfig(**lora))  # a path from here, which is nowhere later
    if below is not None:
        first = trained(tmp_path / "first", local(hub.name, lora=LoraConfig(**below)), seed=1)
        config = replace(config, path=str(tmp_path / "first"))
        start = Policy.load(config, load_tokenizer(config, []), seed=0)
        torch.testing.assert_close(logits(start.model), logits(first.model), atol=1e-5, rtol=1e-5)
    policy = trained(tmp_path / "run" / "model", config, seed=2)
    monkeypatch.chdir(tmp_path)
    told = logits(policy.model)
    for place in (tmp_path / "run" / "model", shutil.copytree(tmp_path / "run" / "model", tmp_path / "exported")):
        torch.testing.assert_close(logits_of_others(Path(place)), told)
    with_path = config if below is not None else replace(config, path=str(hub))
    again = Policy.load(with_path, policy.tokenizer, seed=5)
    again.load_weights(tmp_path / "run" / "model")
    torch.testing.assert_close(logits(again.model), told)
    plain = local(tmp_path / "run" / "model")  # as `mopo eval run=DIR` reads a directory that is no run
    torch.testing.assert_close(
        logits(load_policy(plain, load_tokenizer(plain, []), seed=0)), told, atol=1e-4, rtol=1e-4
    )
    if lora:
        entrant = Entrant("run", str(tmp_path / "run"), "run", TrainConfig(model=with_path))
        write_merged(entrant, tmp_path / "merged")
        torch.testing.assert_close(logits_of_others(tmp_path / "merged"), told, atol=1e-4, rtol=1e-4)


def test_an_adapter_of_another_tool(hub: Path, tmp_path: Path):
    """No tokenizer beside it, and the base model's config.json."""
    policy = policy_of(hub, r=4)
    shake(policy, 4)
    policy.save_pretrained(tmp_path)  # type: ignore[operator]
    shutil.copy(hub / "config.json", tmp_path)
    config = local(tmp_path)
    tokenizer = load_tokenizer(config, [])
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(hub).get_vocab()
    torch.testing.assert_close(logps(load_policy(config, tokenizer, seed=0)), logps(policy), atol=1e-4, rtol=1e-4)


def test_an_adapter_names_the_revision_of_its_base(hub: Path, tmp_path: Path):
    policy = Policy.load(local(hub, lora=LoraConfig(r=2), revision="abc"), load_tokenizer(local(hub), []), seed=0)
    policy.save(tmp_path / "a")
    base = models_hub.base_of_adapter(local(tmp_path / "a"))
    assert base is not None
    assert (base.path, base.revision) == (str(hub), "abc")


def test_adapters_on_which_no_lora_goes(hub: Path, tmp_path: Path):
    trained(tmp_path / "a", local(hub, lora=LoraConfig(r=2)), seed=1)
    config = local(tmp_path / "a", lora=LoraConfig(r=2, target_modules=["q_proj"]))
    assert "model.lora.target_modules=['q_proj']: the adapter at model.path=" in message(config)
    record = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**record, "use_dora": True}))
    assert "cannot load its adapter" in message(config) or "use_dora" in message(config)
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({**record, "base_model_name_or_path": str(tmp_path / "a")})
    )
    assert "an adapter that names itself as its base model" in message(config)
