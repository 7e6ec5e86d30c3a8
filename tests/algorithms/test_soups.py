"""Rewarded soups: weights averaged exactly, of full models and of LoRA, and whole runs that share their policies."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch
from peft import PeftModel
from policies import asking
from running import TINY, Finished, cache_of, read_json, results, stop_when
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mopo_cli.algorithms.pairwise.soups import MERGES, Soups, cook, differences, interpolated
from mopo_cli.base.errors import UserError
from mopo_cli.config.schema import LoraConfig, TokenizerConfig
from mopo_cli.models.load import add_lora
from mopo_cli.models.parts import lora_of
from mopo_cli.models.policy import Snapshot, digest_of
from mopo_cli.models.tokenizers import train_tokenizer

Run = Callable[..., Finished]
NAMES = ("helpful", "harmless", "concise")


def tokenizer(word: str = "words") -> PreTrainedTokenizerFast:
    return train_tokenizer([f"some {word} to learn from"] * 50, TokenizerConfig(vocab_size=300))


def tiny(hidden: int = 16, lora: LoraConfig | None = None) -> Any:
    sizes = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=304, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return model if lora is None else add_lora(model, lora)


def policies(model: nn.Module, count: int) -> list[Snapshot]:
    """Snapshots at random places."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        found.append(
            {
                name: 0.3 * torch.randn(value.shape, generator=generator)
                for name, value in asking(model).snapshot().items()
            }
        )
    return found


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


LORA = LoraConfig(r=3, alpha=6.0)
KINDS = [(None, "factors"), (LORA, "factors"), (LORA, "products")]


class TestCooking:
    @pytest.mark.parametrize(("lora", "merge"), KINDS)
    def test_all_weight_on_a_policy_is_that_policy(self, lora: LoraConfig | None, merge: str):
        """Whether it is the only one, or the others have weight 0."""
        model = tiny(lora=lora)
        given = policies(model, 2)
        asking(model).put(given[1])
        wanted = logits(model)
        cook(asking(model), given[1:], [1.0], merge)
        assert torch.equal(logits(model), wanted)
        cook(asking(model), given, [0.0, 1.0], merge)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("lora", "merge"), KINDS)
    def test_equal_policies_make_no_difference(self, lora: LoraConfig | None, merge: str):
        model = tiny(lora=lora)
        given = policies(model, 1) * 3
        asking(model).put(given[0])
        wanted = logits(model)
        cook(asking(model), given, [0.2, 0.3, 0.5], merge)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)

    def test_a_linear_model_interpolates_exactly(self):
        model, x, weights = nn.Linear(5, 4).double(), torch.randn(7, 5).double(), [0.2, 0.3, 0.5]
        given = [{name: value.double() for name, value in policy.items()} for policy in policies(model, 3)]

        def answers(policy: Snapshot) -> Tensor:
            with asking(model).swapped(policy):
                return model(x).detach()

        mixed = sum(w * answers(policy) for w, policy in zip(weights, given, strict=True))
        torch.testing.assert_close(answers(interpolated(given, weights)), mixed, rtol=1e-12, atol=1e-12)

    def test_low_precision_is_summed_in_float32(self):
        ones = {"w": torch.ones(1, dtype=torch.bfloat16)}
        soup = interpolated([ones] * 11, [1 / 11] * 11)
        assert soup["w"].dtype == torch.bfloat16
        assert soup["w"].item() == 1.0

    def test_factors_and_products_differ_as_derived(self):
        """Products average B A; factors lack w_1 w_2 (B_1 - B_2)(A_1 - A_2)."""
        w, base = (0.3, 0.7), tiny(lora=LORA)
        given = policies(base, 2)
        name = next(name for name in given[0] if "lora_A" in name)
        first, second = ([policy[part] for policy in given] for part in (name, name.replace("lora_A", "lora_B")))
        scale, cooked = 6.0 / 3, {}
        for merge in MERGES:
            model = copy.deepcopy(base)
            cook(asking(model), given, w, merge)
            layer = model.get_submodule(name[: name.index(".lora_A")])
            cooked[merge] = layer.get_delta_weight("default").detach()
        average = sum(share * b @ a for share, a, b in zip(w, first, second, strict=True)) * scale
        torch.testing.assert_close(cooked["products"], average)
        lack = scale * w[0] * w[1] * (second[0] - second[1]) @ (first[0] - first[1])
        torch.testing.assert_close(cooked["products"] - cooked["factors"], lack, rtol=1e-4, atol=1e-5)

    def test_products_are_the_average_of_merged_models(self):
        w, base = [0.3, 0.7], tiny(lora=LORA)
        given, merged = policies(base, 2), []
        for policy in given:
            model = copy.deepcopy(base)
            asking(model).put(policy)
            merged.append(dict(model.merge_and_unload().state_dict()))
        plain = tiny()
        plain.load_state_dict({name: w[0] * merged[0][name] + w[1] * merged[1][name] for name in merged[0]})
        cook(asking(base), given, w, "products")
        torch.testing.assert_close(logits(base), logits(plain), rtol=1e-4, atol=1e-5)

    def test_a_soup_of_products_is_saved_and_loads(self, tmp_path: Path):
        """With PEFT, and into a policy of the first rank, whose reference still works; the other way round, too."""
        base = tiny(lora=LORA)
        start, given = asking(base).snapshot(), policies(base, 2)
        before = logits(base)
        asking(base, tokenizer()).save(tmp_path / "reference")
        cook(asking(base), given, [0.3, 0.7], "products")
        wanted = logits(base)
        with asking(base).swapped(start):
            assert torch.equal(logits(base), before)
        assert torch.equal(logits(base), wanted)
        asking(base, tokenizer()).save(tmp_path / "model")
        torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny(), tmp_path / "model")), wanted)
        other = tiny(lora=LORA)
        asking(other).load_weights(tmp_path / "model")
        torch.testing.assert_close(logits(other), wanted)
        config = lora_of(other)
        assert config is not None
        assert (config.r, config.lora_alpha) == (6, 12)
        assert all(p.requires_grad == ("lora_" in name) for name, p in other.named_parameters())
        asking(other).load_weights(tmp_path / "reference")
        torch.testing.assert_close(logits(other), before)


def test_the_cache_tells_adapters_of_another_scale_apart():
    """Weights that are the same make another policy where LoRA's alpha is another."""
    first, same, other = (tiny(lora=LoraConfig(r=3, alpha=alpha)) for alpha in (6.0, 6.0, 9.0))
    assert digest_of(first) == digest_of(same) != digest_of(other)


class TestIncompatible:
    def saved(self, directory: Path, model: Any, word: str = "words") -> Path:
        asking(model, tokenizer(word)).save(directory)
        return directory

    def test_what_differs(self, tmp_path: Path):
        model, adapted = tiny(), tiny(lora=LORA)
        plain, with_lora = asking(model, tokenizer()), asking(adapted, tokenizer())
        same, lora = self.saved(tmp_path / "same", tiny()), self.saved(tmp_path / "lora", adapted)
        wide = self.saved(tmp_path / "wide", tiny(hidden=24))
        assert differences(plain, same) == ""
        assert differences(with_lora, lora) == ""
        assert differences(plain, wide) == "lm_head.weight is (304, 24) there, (304, 16) here"
        assert "it has a LoRA adapter, the run trains all its weights" in differences(plain, lora)
        assert "it has all its weights, the run trains a LoRA adapter" in differences(with_lora, same)
        assert "its tokenizer has another vocabulary" in differences(asking(model, tokenizer("animals")), same)
        other = tiny(lora=LoraConfig(r=3, alpha=9.0))
        assert "its LoRA has r=3 and alpha=6, the run's r=3 and alpha=9" in differences(
            asking(other, tokenizer()), lora
        )
        (same / "model.safetensors").write_bytes(b"torn")
        assert "it cannot be loaded" in differences(plain, same)

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"weights": {"helpful": 0.0}}, "algorithm.weights={helpful: 0.0}: all are zero"),
            ({"merge": "svd"}, "algorithm.merge=svd: must be factors or products"),
            ({"loss": "kto"}, "algorithm.loss=kto: must be sigmoid or ipo or hinge or robust"),
            ({"experts": {"kind": "x"}}, "algorithm.experts.kind=x: kind is no objective; the set has "),
            ({"experts": {"helpful": "nowhere"}}, "helpful=nowhere: must be a finished run or a model directory; "),
            ({"experts": ["x"]}, "must be a run or model directory for each objective, or null"),
        ],
    )  # fmt: skip
    def test_bad_settings(self, bad: dict[str, Any], message: str):
        with pytest.raises(UserError) as told:
            Soups(NAMES, 0.1, **bad)
        assert message in str(told.value)


@pytest.mark.slow
class TestRuns:
    def test_weightings_share_the_policies_and_mix_exactly(self, smoke: Path, here: Path, run_here: Run):
        """One of the runs goes on after a kill in the second policy, whose training is neither lost nor paid twice."""
        settings = (*TINY, "algorithm=soups", "steps=60")
        for cache in ("outputs/cache", "another"):
            shutil.copytree(cache_of(smoke), here / cache)
        both = "algorithm.weights={helpful: 0.25, harmless: 0.75}"
        assert run_here("train", *settings, both, "run.dir=whole").status == 0
        run, alone = here / "run", (f"cache={here / 'another'}",)

        def in_the_second() -> bool:
            return any(int(path.name.split("-")[1]) > 60 for path in (run / "checkpoints").glob("step-*"))

        stopped = stop_when(in_the_second, SIGKILL, "train", *settings, *alone, both, f"run.dir={run}", cwd=here)
        assert stopped.status == -SIGKILL
        assert [path.name for path in (run / "stages").iterdir() if not path.name.startswith(".")] == ["dpo-helpful"]
        done = run_here("train", *settings, *alone, both, f"run.dir={run}", "run.resume=true")
        assert done.status == 0, done.err
        assert "alignment (dpo on helpful)" not in done.out
        assert results(run) == results(here / "whole")
        assert read_json(run / "summary.json")["train"]["steps"] == 120

        done = run_here("train", *settings, "algorithm.weights={harmless: 1}", "run.dir=one")
        assert done.status == 0, done.err
        work = read_json(here / "one" / "summary.json")["train"]
        assert (work["steps"], work["reused_steps"]) == (60, 60)
        given = ["{helpful: run/stages/dpo-helpful/model", "harmless: one}"]  # a model's directory and a run's
        done = run_here("train", *settings, both, f"algorithm.experts={', '.join(given)}", "run.dir=given")
        assert done.status == 0, done.err
        assert read_json(here / "given" / "summary.json")["train"]["steps"] == 0
        weights = [weights_of(here / name) for name in ("run", "given")]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        experts = [weights_of(run / "stages" / f"dpo-{name}") for name in ("helpful", "harmless")]
        for name, value in weights_of(here / "one").items():
            assert torch.equal(value, experts[1][name])
            torch.testing.assert_close(weights[0][name], 0.25 * experts[0][name] + 0.75 * experts[1][name])

        asking(tiny(), AutoTokenizer.from_pretrained(here / "one" / "model")).save(here / "other")
        done = run_here("train", *settings, both, "algorithm.experts={helpful: other}", "run.dir=refused")
        assert done.status == 2
        assert "algorithm.experts.helpful: other cannot be part of this soup" in done.err
        assert " there, (" in done.err

    def test_products_of_lora_through_evaluation(self, here: Path, run_here: Run):
        lora = ("model.lora.r=2", "algorithm.merge=products", "algorithm.weights={helpful: 1, concise: 1}")
        done = run_here("train", *TINY, "algorithm=soups", *lora, "run.dir=run")
        assert done.status == 0, done.err
        assert read_json(here / "run" / "model" / "adapter_config.json")["r"] == 4
        assert AutoTokenizer.from_pretrained(here / "run" / "model").eos_token
        done = run_here("eval", "run=run", "evaluation.prompts=4", "dir=judged")
        assert done.status == 0, done.err


def weights_of(path: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(path / "model").state_dict())
