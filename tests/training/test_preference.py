"""The K-head preference model: identities, masking, calibration, and what only its general form can express."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from mopo_cli.base.console import Progress
from mopo_cli.config.schema import ModelConfig, ObjectiveConfig, OptimiserConfig, PreferenceModelConfig, TokenizerConfig
from mopo_cli.data.batches import Collator
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.prepare import load
from mopo_cli.models.load import load_policy
from mopo_cli.models.preference import (
    build_preference_model,
    features_of,
    load_preference_model,
    save_preference_model,
    win_probabilities,
)
from mopo_cli.models.tokenizers import load_tokenizer
from mopo_cli.training.inputs import texts_of
from mopo_cli.training.preference import accuracy, fit_preference_model, pair_batch, pair_logits, preference_loss

TINY = ModelConfig(
    init="random",
    architecture={
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.08, "tie_word_embeddings": False,
    },
    tokenizer=TokenizerConfig(train=True, vocab_size=2048, min_frequency=20, across_words=True),
)  # fmt: skip


@pytest.fixture(scope="module")
def world():
    dataset = {
        "_target_": "mopo_cli.data.assistant.assistant", "rows": 1200, "cyclic": True,
        "heldout_fraction": 0.15, "test_fraction": 0.1,
    }  # fmt: skip
    data = load(dataset, {"helpful": ObjectiveConfig("primary"), "tone": ObjectiveConfig("secondary")})
    tokenizer = load_tokenizer(TINY, texts_of(data.train))
    encoder = Encoder(tokenizer, 256)
    policy = load_policy(TINY, tokenizer, seed=0)
    rows = {name: encoder.rows(getattr(data, name))[0] for name in ("train", "heldout")}
    return data, policy, rows, Collator(int(tokenizer.pad_token_id)), encoder  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["bradley_terry", "general"])
def test_probabilities_of_both_orders_sum_to_one(world, form):
    _, policy, rows, collate, _ = world
    model = build_preference_model(policy, 2, form, 2, seed=1)
    first, second = features_of(model, rows["train"][:2], collate)
    forward, backward = win_probabilities(model, first, second), win_probabilities(model, second, first)
    assert torch.allclose(forward + backward.transpose(0, 1), torch.ones_like(forward), atol=1e-6)
    itself = win_probabilities(model, first, first)
    assert torch.allclose(itself.diagonal(dim1=0, dim2=1), torch.full((2, len(first)), 0.5), atol=1e-6)


def test_swapping_the_sides_of_a_pair_leaves_the_loss(world):
    data, policy, rows, collate, _ = world
    model = build_preference_model(policy, 2, "general", 2, seed=1)
    batch = pair_batch(data.train[:4], rows["train"][:4], collate, torch.device("cpu"))
    logits = pair_logits(model, batch)
    losses, _ = preference_loss(logits, batch.labels)
    swapped, _ = preference_loss(-logits, 1.0 - batch.labels)
    assert torch.allclose(losses, swapped, atol=1e-6)


def test_missing_labels_add_nothing_and_get_no_gradient():
    logits = torch.tensor([[0.3, 2.0], [1.0, -1.0]], requires_grad=True)
    labels = torch.tensor([[1.0, math.nan], [0.5, 0.0]])
    losses, known = preference_loss(logits, labels)
    losses.sum().backward()
    assert losses[0, 1] == 0
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert known.tolist() == [[True, False], [True, True]]
    assert losses[0, 0].item() == pytest.approx(math.log(1 + math.exp(-0.3)))
    assert losses[1, 0].item() == pytest.approx(
        -0.5 * (math.log(1 / (1 + math.exp(-1))) + math.log(1 / (1 + math.e))), 1e-6
    )


def test_accuracy_counts_decided_labels_only():
    logits = torch.tensor([[1.0], [1.0], [-1.0], [2.0]])
    labels = torch.tensor([[1.0], [0.0], [0.5], [math.nan]])
    assert accuracy(logits, labels) == [0.5]


def fit(world, form: str):
    data, policy, rows, collate, _ = world
    model = build_preference_model(policy, 2, form, 2, seed=0)
    optimiser = OptimiserConfig(learning_rate=1e-3, weight_decay=0.01, warmup=10)
    config = PreferenceModelConfig(form=form, steps=250, batch_size=32, evaluate_every=50, optimiser=optimiser)
    parts = (data.train, rows["train"]), (data.heldout, rows["heldout"])
    measured = fit_preference_model(Accelerator(), model, *parts, collate, config, 0, Progress("fit", 250, None))
    return model, measured


@pytest.mark.slow
def test_only_the_general_form_learns_a_cycle(world):
    data, _, _, collate, encoder = world
    scored, general = fit(world, "bradley_terry"), fit(world, "general")
    tone = 1  # openings beat each other in a circle with probability 0.9
    assert general[1][tone] > scored[1][tone] + 0.1
    prompt = data.test[0].prompt
    body = "There are many ways, and it depends."
    circle = [body, f"Sure! {body}", f"Great question, thanks for asking. {body}"]
    (feature,) = features_of(general[0], [encoder.row(prompt, circle)], collate)
    p = win_probabilities(general[0], feature, feature)[:, :, tone]
    assert p[1, 0] > 0.7
    assert p[2, 1] > 0.7
    assert p[0, 2] > 0.7


def test_saved_and_loaded_it_says_the_same(world, tmp_path):
    _, policy, rows, collate, _ = world
    model = build_preference_model(policy, 2, "general", 3, seed=4)
    save_preference_model(model, tmp_path / "judge", ("helpful", "tone"), [0.7, 0.6])
    loaded, measured = load_preference_model(tmp_path / "judge", policy)
    assert measured == [0.7, 0.6]
    for before, after in zip(
        features_of(model, rows["train"][:3], collate), features_of(loaded, rows["train"][:3], collate), strict=True
    ):
        assert torch.equal(before, after)
        assert torch.equal(win_probabilities(model, before, before), win_probabilities(loaded, after, after))
