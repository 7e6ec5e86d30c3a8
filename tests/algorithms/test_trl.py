"""Parity with TRL's DPOTrainer: losses and gradients of our pairwise methods on the same models and the same pairs.

TRL is looked for here (the extra mopo[parity]) and where TRL_PYTHON, an interpreter, has it (as `make bench` does).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from running import TIMEOUT
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mopo_cli.algorithms.pairwise.batches import pair_table
from mopo_cli.algorithms.pairwise.dpo import Dpo
from mopo_cli.base.types import Example
from mopo_cli.data.encoder import Encoder
from mopo_cli.models.logprobs import all_logps, collator_of, sequence_logps

PYTHON = os.environ.get("TRL_PYTHON") or (sys.executable if find_spec("trl") else None)
TAU, FLIPS, VOCABULARY = 0.1, 0.1, 60
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0},
}  # fmt: skip
THEIRS = """
import json, os, sys, tempfile
os.environ["HF_HUB_OFFLINE"] = "1"
from datasets import load_dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
folder, tau, flips = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
losses = {}
for name in ("sigmoid", "sigmoid_norm", "hinge", "robust", "ipo", "swapped"):
    model, reference = (AutoModelForCausalLM.from_pretrained(f"{folder}/{part}") for part in ("model", "reference"))
    data = load_dataset("json", data_files=f"{folder}/pairs.jsonl", split="train")
    if name == "swapped":
        data = data.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    config = DPOConfig(output_dir=tempfile.mkdtemp(), beta=tau, loss_type=["sigmoid" if name == "swapped" else name],
                       label_smoothing=flips if name == "robust" else 0.0, per_device_train_batch_size=len(data),
                       use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True)
    trainer = DPOTrainer(model=model, ref_model=reference, args=config, train_dataset=data, processing_class=tokenizer)
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    losses[name] = loss.item()
    gradients = {key: p.grad.contiguous() for key, p in model.named_parameters() if p.grad is not None}
    save_file(gradients, f"{folder}/{name}.safetensors")
with open(f"{folder}/losses.json", "w") as file:
    json.dump(losses, file)
"""
SETTINGS = {  # ours, of the same loss
    "sigmoid": {"loss": "sigmoid"},
    "sigmoid_norm": {"loss": "sigmoid", "length_normalised": True},
    "hinge": {"loss": "hinge"},
    "robust": {"loss": "robust", "smoothing": FLIPS},
    "ipo": {"loss": "ipo", "length_normalised": True},
}

pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="needs TRL: the extra mopo[parity], or TRL_PYTHON=PYTHON of an environment that has it"
)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, another as its reference, pairs of many lengths, and what TRL makes of them."""
    target = tmp_path_factory.mktemp(request.param)
    words = ["<pad>", "</s>", *(f"w{i}" for i in range(2, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="</s>")
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = AutoConfig.for_model(request.param, **ARCHITECTURES[request.param], **special)
    for seed, part in enumerate(("model", "reference")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # far from uniform, so that log-ratios are no small numbers
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(target / part)
        fast.save_pretrained(target / part)
    generator = torch.Generator().manual_seed(2)

    def text(least: int, most: int) -> str:
        count = int(torch.randint(least, most, (1,), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(2, VOCABULARY, (count,), generator=generator).tolist())

    pairs = [{"prompt": text(2, 12), "chosen": f" {text(1, 15)}", "rejected": f" {text(1, 15)}"} for _ in range(6)]
    (target / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = [str(PYTHON), "-c", THEIRS, str(target), str(TAU), str(FLIPS)]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=kept, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def ours(folder: Path, method: Dpo) -> tuple[float, dict[str, Tensor]]:
    """Our mean loss, through the path that training takes, and its gradients."""
    model, reference = (AutoModelForCausalLM.from_pretrained(folder / part) for part in ("model", "reference"))
    encoder = Encoder(AutoTokenizer.from_pretrained(folder / "model"), 64)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    examples = [Example(p["prompt"], (p["chosen"], p["rejected"]), ((0, 1),), ((1.0,),)) for p in pairs]
    tokens = [encoder.row(example.prompt, example.responses) for example in examples]
    collate, rows = collator_of(model, encoder), range(len(tokens))
    before = all_logps(reference, tokens, collate)
    table = pair_table(examples, tokens, rows, method.shares, method.shares, before)
    loss = method.losses(table.of(rows, sequence_logps(model, collate(tokens)))).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def theirs(folder: Path, name: str) -> tuple[float, dict[str, Tensor]]:
    return json.loads((folder / "losses.json").read_text())[name], load_file(folder / f"{name}.safetensors")


def check(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(value.abs().max()) for value in expected[1].values())
    assert largest > 1e-3
    for name, value in expected[1].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-5, atol=1e-5 * max(1.0, largest), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
class TestTrl:
    @pytest.mark.parametrize("name", list(SETTINGS))
    def test_losses_and_gradients_are_equal(self, folder: Path, name: str):
        check(ours(folder, Dpo(("human",), TAU, **SETTINGS[name])), theirs(folder, name))

    def test_smoothing_mixes_in_the_pairs_the_other_way_round(self, folder: Path):
        """TRL's sigmoid loss knows no smoothing; this is its definition (cDPO) on TRL's own losses."""
        there, back = theirs(folder, "sigmoid"), theirs(folder, "swapped")
        mixed = {name: (1 - FLIPS) * there[1][name] + FLIPS * back[1][name] for name in there[1]}
        expected = (1 - FLIPS) * there[0] + FLIPS * back[0], mixed
        check(ours(folder, Dpo(("human",), TAU, smoothing=FLIPS)), expected)
