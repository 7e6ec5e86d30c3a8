"""Packed and plain log-probs, the batches they come from, the encoder, and sampling."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Example
from mopo_cli.config.schema import SamplingConfig
from mopo_cli.data.batches import Collator, batch_rows, length_order, pack, under_budget
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.table import TokenRow, row_length
from mopo_cli.models import logprobs
from mopo_cli.models.attention import attend_by_rows
from mopo_cli.models.logprobs import (
    _shorter,
    all_logps,
    can_pack,
    gather_slots,
    head_logps,
    response_logps,
    sequence_logps,
    splits,
)
from mopo_cli.models.parts import backbone_of, compute_in, unwrap
from mopo_cli.models.sampling import sample

torch.set_num_threads(1)  # threads only get in each other's way on tiny models

PLAIN, PACKED, APART = Collator(pad=0, packed=False), Collator(pad=0), Collator(pad=0, apart=True)
VOCABULARY = 48
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 96, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
ROTARY = {"intermediate_size": 48, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt, norm after, projected": {
        "model_type": "opt",
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "gpt2": {"model_type": "gpt2"},
    "llama": {"model_type": "llama", **ROTARY},
    "llama 3.1": {
        "model_type": "llama",
        **ROTARY,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2": {"model_type": "qwen2", **ROTARY},
    "qwen3": {"model_type": "qwen3", **ROTARY, "head_dim": 8, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", **ROTARY, "head_dim": 8},
    "gemma2": {"model_type": "gemma2", **ROTARY, "head_dim": 8, "sliding_window": 64},  # caps its logits
    "cohere": {"model_type": "cohere", **ROTARY},  # scales them
    "gptj": {"model_type": "gptj", "rotary_dim": 4},  # eager attention, a bias in its head
}
UNPACKABLE: dict[str, dict[str, Any]] = {
    "mamba": {"model_type": "mamba", "state_size": 8},  # no attention at all
    "bloom": {"model_type": "bloom"},  # positions from the mask
    "mpt": {"model_type": "mpt", "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 96},
    "layers in the head": {"model_type": "modernbert-decoder", "intermediate_size": 48, "local_attention": 8},
    "sliding window": {"model_type": "mistral", **ROTARY, "sliding_window": 16},
}


def build(spec: dict[str, Any], dtype: torch.dtype = torch.float32, attention: str | None = None) -> nn.Module:
    """A model with weights large enough that a token out of place would show."""
    values = {**SHAPE, **spec}
    kind = values.pop("model_type")
    arguments = {"attn_implementation": attention} if attention else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), **arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.15 * noise if p.dim() >= 2 else p + 0.1 * noise)
    return model.to(dtype).eval()


def tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(5, VOCABULARY, count).tolist()


def some_rows(seed: int = 0) -> list[TokenRow]:
    """Rows with one, two and three responses, a prompt of one token, a response of one, and a row twice."""
    rng = np.random.default_rng(seed)
    rows = [
        TokenRow(tokens(rng, 4), [tokens(rng, 5), tokens(rng, 3), tokens(rng, 7)]),
        TokenRow(tokens(rng, 1), [tokens(rng, 6), tokens(rng, 1)]),
        TokenRow(tokens(rng, 9), [tokens(rng, 2)]),
    ]
    return [*rows, rows[0]]


def by_hand(model: nn.Module, rows: list[TokenRow]) -> list[list[float]]:
    """Each response alone behind its prompt: all logits, log-softmax, the token's entry, summed in float64."""
    out = []
    for row in rows:
        values = []
        for response in row.responses:
            logits = model(input_ids=torch.tensor([row.prompt + response]), use_cache=False).logits[0]
            table = torch.log_softmax(logits.double(), dim=-1)
            start = len(row.prompt) - 1
            values.append(sum(float(table[start + i, token]) for i, token in enumerate(response)))
        out.append(values)
    return out


def assert_rows(found: Tensor, expected: list[list[float]], tolerance: float = 1e-4) -> None:
    for b, values in enumerate(expected):
        torch.testing.assert_close(
            found[b, : len(values)].double(), torch.tensor(values).double(), atol=tolerance, rtol=tolerance
        )
        assert not found[b, len(values) :].any()


# --------------------------------------------------------------------------------------------- packed, plain, by hand


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_packed_plain_and_by_hand_agree(name):
    model, rows = build(ARCHITECTURES[name]), some_rows()
    expected = by_hand(model, rows)
    assert np.ptp([v for values in expected for v in values]) > 1.0
    assert_rows(response_logps(model, PLAIN(rows)), expected)
    assert can_pack(model, longest=32)
    assert_rows(response_logps(model, PACKED(rows)), expected)
    if attend_by_rows(model):
        assert_rows(response_logps(model, APART(rows)), expected)
        assert_rows(response_logps(model, PLAIN(rows)), expected)  # and it still takes a batch without spans
        assert_rows(response_logps(model, PACKED(rows)), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_and_plain_gradients_agree(name):
    model, rows = build(ARCHITECTURES[name]), some_rows()
    weights = torch.tensor([[0.7, -1.2, 0.4], [1.0, 2.0, 0.0], [-0.6, 0.0, 0.0], [0.3, 0.1, 0.5]])
    grads = []
    for collate in (PLAIN, PACKED, *([APART] if attend_by_rows(model) else [])):
        model.zero_grad()
        (weights * response_logps(model, collate(rows))).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in grads[1:]:
        assert len(grads[0]) == len(other) > 10
        for plain, packed in zip(grads[0], other, strict=True):
            torch.testing.assert_close(packed, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "qwen2", "qwen3", "gemma"])
def test_the_usual_models_attend_by_rows(name):
    assert attend_by_rows(build(ARCHITECTURES[name]))


def test_rows_are_taken_apart_under_gradient_checkpointing_too():
    rows, found = some_rows(), []
    for checkpointing in (False, True):
        model = build(ARCHITECTURES["llama"]).train()
        assert attend_by_rows(model)
        if checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        response_logps(model, APART(rows)).sum().backward()
        found.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_another_attention_is_left_alone():
    model = build(ARCHITECTURES["llama"], attention="eager")
    assert not attend_by_rows(model)
    assert model.config._attn_implementation == "eager"  # type: ignore[union-attr]


def test_a_saved_model_knows_nothing_of_our_attention(tmp_path):
    model = build(ARCHITECTURES["llama"])
    assert attend_by_rows(model)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert "mopo" not in (tmp_path / "config.json").read_text()
    rows = some_rows()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval().requires_grad_(False)
    model.requires_grad_(False)
    assert_rows(response_logps(loaded, PLAIN(rows)), by_hand(model, rows))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [22, 1000])  # two tokens at a time; all at once
def test_the_chunked_head_is_the_whole_head(monkeypatch, bias, frozen, chunk):
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=bias).double().requires_grad_(not frozen)
    hidden, target = torch.randn(13, 6, dtype=torch.double, requires_grad=True), torch.randint(11, (13,))
    weights = torch.randn(13)
    monkeypatch.setattr(logprobs, "_CHUNK", (chunk, chunk))
    found = []
    for values in (head_logps(head, hidden, target), torch.log_softmax(head(hidden), -1)[range(13), target].float()):
        head.zero_grad()
        hidden.grad = None
        (weights * values).sum().backward()
        found.append((values, hidden.grad, *(p.grad for p in head.parameters())))
    for ours, whole in zip(*found, strict=True):
        if whole is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-6)


def test_a_head_in_bfloat16_sums_its_gradient_in_float32(monkeypatch):
    torch.manual_seed(0)
    head, hidden, target = nn.Linear(8, 9, bias=False), torch.randn(400, 8), torch.randint(9, (400,))
    exact = torch.autograd.grad(-nn.functional.cross_entropy(head(hidden), target, reduction="sum"), head.weight)[0]
    monkeypatch.setattr(logprobs, "_CHUNK", (9, 9))  # one token at a time: 400 terms
    low = nn.Linear(8, 9, bias=False, dtype=torch.bfloat16)
    low.weight.data.copy_(head.weight)
    head_logps(low, hidden.bfloat16(), target).sum().backward()
    assert low.weight.grad is not None
    assert float((low.weight.grad.float() - exact).norm() / exact.norm()) < 0.01


def test_a_head_that_is_more_than_linear_is_chunked_as_well(monkeypatch):
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3.0 * super().forward(x)

    torch.manual_seed(0)
    head, hidden, target = Scaled(6, 11), torch.randn(13, 6), torch.randint(11, (13,))
    monkeypatch.setattr(logprobs, "_CHUNK", (22, 22))
    expected = torch.log_softmax(head(hidden), -1)[range(13), target]
    torch.testing.assert_close(head_logps(head, hidden, target), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_either_attention_takes_the_packed_mask(attention):
    model, rows = build(ARCHITECTURES["qwen3"], attention=attention), some_rows()
    assert can_pack(model)
    assert_rows(response_logps(model, PACKED(rows)), by_hand(model, rows))


@pytest.mark.parametrize("name", UNPACKABLE)
@torch.no_grad()
def test_models_that_cannot_pack_are_found_and_right_without(name):
    model, rows = build(UNPACKABLE[name]), some_rows()
    assert not can_pack(model, longest=32)
    assert_rows(response_logps(model, PLAIN(rows)), by_hand(model, rows))


@torch.no_grad()
def test_layouts_are_compared_in_float32_under_mixed_precision(monkeypatch):
    """Of a model of 30 layers bfloat16's products differ by more from one layout to another than a wrong mask may."""
    model, asked = build(ARCHITECTURES["llama"]), []
    compute_in(model, torch.bfloat16)

    def recorded(model, batch):
        asked.append(model.compute_dtype)
        return sequence_logps(model, batch)

    monkeypatch.setattr(logprobs, "sequence_logps", recorded)
    assert can_pack(model, longest=32)
    assert asked == [None, None]
    assert [part.compute_dtype for part in (model, backbone_of(model))] == [torch.bfloat16] * 2  # type: ignore[union-attr]


@torch.no_grad()
def test_a_sliding_window_packs_where_it_holds_the_longest_row():
    model = build(UNPACKABLE["sliding window"])
    assert can_pack(model, longest=16)
    assert not can_pack(model, longest=17)
    assert not can_pack(model)
    rng = np.random.default_rng(0)
    fits, long = TokenRow(tokens(rng, 6), [tokens(rng, 10)] * 2), TokenRow(tokens(rng, 20), [tokens(rng, 10)])
    assert_rows(response_logps(model, PACKED([fits] * 3)), by_hand(model, [fits] * 3))
    assert_rows(response_logps(model, PLAIN([long])), by_hand(model, [long]))
    off = float(response_logps(model, PACKED([long]))[0, 0]) - by_hand(model, [long])[0][0]
    assert abs(off) > 0.01, "a window that is ignored would not show here"


def test_can_pack_and_splits_leave_the_model_as_it_was():
    model = build(ARCHITECTURES["opt"]).train()
    before = torch.get_rng_state()
    assert can_pack(model)
    assert splits(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["gemma2", "cohere", "llama"])
def test_logits_that_are_changed_after_the_head_are_noticed(name):
    assert splits(build(ARCHITECTURES[name])) == (name == "llama")


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
@torch.no_grad()
def test_bfloat16_sums_in_float32(name):
    model, rows = build(ARCHITECTURES[name], torch.bfloat16), some_rows()
    found = response_logps(model, PLAIN(rows))
    assert found.dtype == torch.float32
    expected = []
    for row in rows:  # the model's own bfloat16 logits, everything after them in float64
        batch = PLAIN([row])
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double().flatten(0, 1)
        values = torch.log_softmax(logits, -1)[batch.source, batch.target]
        expected.append([float(values[batch.owner == n].sum()) for n in range(len(row.responses))])
    assert_rows(found, expected, tolerance=2e-2)
    assert can_pack(model)


@torch.no_grad()
def test_all_logps_is_in_the_order_of_the_rows_whatever_the_budget():
    model, rows = build(ARCHITECTURES["llama"]).train(), some_rows()
    expected = by_hand(model, rows)
    for budget in (1, 30, 10_000):
        for packed in (False, True):
            found = all_logps(model, rows, Collator(0, packed, budget=budget))
            assert [len(f) for f in found] == [3, 2, 1, 3]
            for values, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(values, torch.tensor(wanted), atol=1e-4, rtol=1e-4)
    assert model.training
    assert all_logps(model, [], PACKED) == []


@torch.no_grad()
def test_a_row_of_many_responses_goes_through_in_pieces():
    model, rng = build(ARCHITECTURES["llama"]), np.random.default_rng(0)
    many = TokenRow(tokens(rng, 5), [tokens(rng, int(n)) for n in rng.integers(1, 30, 40)])
    pieces = _shorter(many)
    assert len(pieces) > 3
    assert {tuple(piece.prompt) for piece in pieces} == {tuple(many.prompt)}
    assert [response for piece in pieces for response in piece.responses] == many.responses
    long = TokenRow(tokens(rng, 200), many.responses)
    assert _shorter(long) == [long]  # a long prompt costs more than the square
    rows = [*some_rows(), many, TokenRow(many.prompt, [tokens(rng, 400)])]
    for values, expected in zip(all_logps(model, rows, PACKED), by_hand(model, rows), strict=True):
        assert values.tolist() == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_budget_batches_hold_every_row_once_and_keep_the_budget():
    rows = some_rows() * 5
    batches = under_budget(range(len(rows)), [row_length(row) for row in rows], 40)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    assert all(len(batch) == 1 or sum(row_length(rows[i]) for i in batch) <= 40 for batch in batches)
    assert under_budget(range(len(rows)), [row_length(row) for row in rows], 0) == [[i] for i in length_order(rows)]


def test_gather_slots_fills_where_a_row_has_no_response():
    slot = torch.tensor([[0, 1], [2, -1]])
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert gather_slots(values, slot).tolist() == [[[1, 2], [3, 4]], [[5, 6], [0, 0]]]
    assert gather_slots(values[:, 0], slot, fill=-1.0).tolist() == [[1, 3], [5, -1]]


def test_wrappers_are_taken_off():
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

    model = build(ARCHITECTURES["opt"])
    assert unwrap(Wrapper(Wrapper(model))) is model
    assert type(backbone_of(model)).__name__ == "OPTDecoder"
    assert backbone_of(nn.Linear(2, 2)) is None
    rows = some_rows()
    torch.testing.assert_close(sequence_logps(Wrapper(model), PACKED(rows)), sequence_logps(model, PACKED(rows)))


# --------------------------------------------------------------------------------------------- batches


ROWS = st.lists(
    st.builds(
        TokenRow,
        st.lists(st.integers(5, 40), min_size=1, max_size=6),
        st.lists(st.lists(st.integers(5, 40), min_size=1, max_size=5), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=8,
)


@given(ROWS, st.booleans(), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_a_batch_holds_every_response_of_every_row(rows, packed, least):
    batch = Collator(pad=0, packed=packed)(rows)
    flat, length = batch.input_ids.flatten(), batch.input_ids.shape[1]
    assert batch.slot.shape == (len(rows), max(len(row.responses) for row in rows))
    for b, row in enumerate(rows):
        numbers = batch.slot[b][batch.slot[b] >= 0]
        assert len(numbers) == len(row.responses)
        for number, response in zip(numbers.tolist(), row.responses, strict=True):
            mine = batch.owner == number
            assert batch.target[mine].tolist() == response
            assert int(flat[batch.last[number]]) == response[-1]
            source = batch.source[mine]
            assert flat[source].tolist() == [row.prompt[-1], *response[:-1]]
            assert sees(batch, int(source[-1]), length) == [*row.prompt, *response[:-1]]
    pieces, longest = pack(rows, least)
    assert sorted(i for piece in pieces for i in piece) == list(range(len(rows)))
    assert longest == max(sum(row_length(rows[i]) for i in piece) for piece in pieces)
    assert longest <= max(least, *map(row_length, rows))


def sees(batch: Any, place: int, length: int) -> list[int]:
    """The tokens that a place of the batch looks at, itself included."""
    s, t = divmod(place, length)
    if batch.position_ids is None:
        return batch.input_ids[s, : t + 1].tolist()
    seen = batch.attention_mask[s, 0, t]
    assert batch.position_ids[s][seen].tolist() == list(range(int(seen.sum())))
    return batch.input_ids[s][seen].tolist()


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_row_comes_once_an_epoch(size, batch, seed):
    steps = math.ceil(3 * size / batch)
    seen = [row for step in range(steps) for row in batch_rows(size, batch, seed, step)]
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))
    for step in reversed(range(steps)):
        assert batch_rows(size, batch, seed, step) == seen[step * batch : (step + 1) * batch]


def test_epochs_and_seeds_differ():
    orders = {tuple(batch_rows(50, 50, seed, step)) for seed in range(3) for step in range(3)}
    assert len(orders) == 9
    assert batch_rows(0, 4, 0, 0) == []


# --------------------------------------------------------------------------------------------- the encoder

WORDS = [f"w{i}" for i in range(20)]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
)


def word_tokenizer(bos: bool = False, closes: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """A token a word; newlines are a token too. `bos` puts <s> first, `closes` </s> last, as some hub tokenizers do."""
    names = ["<pad>", "</s>", "<s>", "<unk>", "\n", *WORDS, "Human:", "Assistant:", "[user]", "[system]", "[go]"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    newline = pre_tokenizers.Split("\n", behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([newline, pre_tokenizers.Split(" ", behavior="removed")])
    pieces = (["<s>"] if bos else []) + ["$A"] + (["</s>"] if closes else [])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=pieces, special_tokens=[("<s>", 2), ("</s>", 1)]
    )  # fmt: skip
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        **({"bos_token": "<s>"} if bos else {}),
    )
    made.chat_template = template
    return made


def encoder(max_length: int = 64, chat_template: str = "auto", **kwargs: Any) -> Encoder:
    return Encoder(word_tokenizer(**kwargs), max_length, chat_template)


def words(encoder: Encoder, ids: list[int]) -> list[str]:
    return encoder.tokenizer.convert_ids_to_tokens(ids)  # type: ignore[return-value]


def prompt_words(encoder: Encoder, prompt: Any, response: str) -> list[str]:
    return words(encoder, encoder.prompt_ids(prompt, response))


def example(prompt: Any, *responses: Any) -> Example:
    return Example(prompt, responses, ((0, 1),), ((1.0,),), source="rows.jsonl:4")


@pytest.mark.parametrize(
    ("prompt", "response", "text"),
    [
        ("w1 w2", "w3", "w1 w2\n"),
        ("w1 w2\n", "w3", "w1 w2\n"),
        ("w1 w2 ", "w3", "w1 w2 "),
        ("w1 w2", " w3", "w1 w2"),
        ("w1 w2", "\nw3", "w1 w2"),
        ("w1 w2", "", "w1 w2"),
        ("", "w3", ""),
        ("w1", [{"role": "assistant", "content": " w3"}], "w1"),
        ("w1", [{"role": "assistant", "content": "w3"}], "w1\n"),
    ],
)
def test_a_plain_prompt_is_kept_apart_from_the_response(prompt, response, text):
    assert encoder().prompt_text(prompt, response) == text


def test_a_response_ends_with_the_end_token():
    e = encoder(bos=True, closes=True)
    assert words(e, e.response_ids("w1 w2")) == ["w1", "w2", "</s>"]
    assert words(e, e.response_ids([{"role": "assistant", "content": "w5"}])) == ["w5", "</s>"]
    assert words(e, e.response_ids("")) == ["</s>"]


def test_a_prompt_starts_as_its_tokenizer_starts_and_stays_open():
    assert prompt_words(encoder(bos=True, closes=True), "w1", "w2") == ["<s>", "w1", "\n"]
    assert prompt_words(encoder(), "w1", "w2") == ["w1", "\n"]


@torch.no_grad()
def test_an_empty_prompt_leaves_a_token_to_predict_from():
    assert prompt_words(encoder(), "", "w2") == ["</s>"]
    assert prompt_words(encoder(bos=True), "", "w2") == ["<s>"]
    model = build({"model_type": "llama", **ROTARY})
    rows = [encoder().row("", ["w1 w2", "w3"]), encoder().row("w4", ["w5", "w6"])]
    for collate in (PLAIN, PACKED):
        assert_rows(response_logps(model, collate(rows)).detach(), by_hand(model, rows))


CONVERSATION = [
    {"role": "system", "content": "w0"},
    {"role": "user", "content": "w1"},
    {"role": "assistant", "content": "w2"},
    {"role": "user", "content": "w3"},
]


def test_a_conversation_without_a_template_is_a_transcript():
    e = encoder(bos=True)
    expected = "System: w0\n\nHuman: w1\n\nAssistant: w2\n\nHuman: w3\n\nAssistant:\n"
    assert e.prompt_text(CONVERSATION, "w4") == expected
    assert prompt_words(e, CONVERSATION, "w4")[0] == "<s>"


def test_a_conversation_goes_through_the_tokenizers_template_which_brings_its_own_special_tokens():
    e = encoder(bos=True, template=TEMPLATE)
    assert e.prompt_text(CONVERSATION[1:2]) == "[user] w1 [go]"
    assert prompt_words(e, CONVERSATION[1:2], "w4") == ["[user]", "w1", "[go]"]
    assert prompt_words(e, "w1", "w4") == ["<s>", "w1", "\n"], "auto leaves plain prompts alone"


def test_always_makes_a_plain_prompt_the_users_turn():
    e = encoder(bos=True, template=TEMPLATE, chat_template="always")
    assert prompt_words(e, "w1", "w4") == ["[user]", "w1", "[go]"]
    assert encoder(chat_template="always").prompt_text("w1", "w4") == "Human: w1\n\nAssistant:\n"


def test_a_template_that_refuses_a_prompt_names_the_row():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    e = encoder(template=template)
    with pytest.raises(UserError, match=r"^rows\.jsonl:4: .*no system turns"):
        e.rows([example(CONVERSATION, "w1", "w2")])


def test_a_condition_where_the_template_knows_no_system_message():
    refuses = "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template = "{% for m in messages %}" + refuses + "[user] {{ m.content }} "
    plain, knows = encoder(template=template + "{% endfor %}"), encoder(template=TEMPLATE)
    turn = [{"role": "user", "content": "w1"}]
    assert plain.conditioned("w5").prompt_text(turn) == "[user] w5\nw1 [user] "
    assert "w5" in knows.conditioned("w5").prompt_text(turn)
    assert knows.conditioned("w5").prompt_text(turn) != plain.conditioned("w5").prompt_text(turn)
    assert plain.condition_tokens("w5 w6") >= 2


def test_rows_that_do_not_fit():
    short, long = example("w1", "w2", "w3 w4"), example("w1 w2 w3", "w4", "w5 w6 w7")
    with pytest.raises(UserError, match=r"^rows\.jsonl:4: prompt of 4 tokens .*does not fit the context of 7.*1 of 2"):
        encoder(max_length=7).rows([short, long])
    e = encoder(max_length=7)
    rows, kept = e.rows([short, long], overlong="drop")
    assert kept == [short]
    assert [row.responses for row in rows] == [[e.response_ids("w2"), e.response_ids("w3 w4")]]
    assert e.longest_response == 3, "rows that are left out do not lengthen the samples"
    rows, kept = encoder(max_length=8).rows([short, long])
    assert len(rows) == len(kept) == 2
    with pytest.raises(UserError, match=r"dataset\.overlong=ignore: must be error or drop"):
        e.rows([short], overlong="ignore")


def test_no_rows_are_no_error():
    e = encoder(max_length=4)
    assert e.rows([]) == ([], [])
    assert e.rows([example("w1 w2 w3 w4", "w5", "w6")], overlong="drop") == ([], [])
    assert e.longest_response == 4
    e.rows([example("w1", "w5", "w6")])
    e.rows([example("w1", "", "")])
    assert e.longest_response == 2, "the longest of all splits"


# --------------------------------------------------------------------------------------------- sampling

SAMPLER = build({"model_type": "llama", **ROTARY, "vocab_size": 30})


def encoded(e: Encoder, prompts: list[str]) -> list[list[int]]:
    return [e.prompt_ids(prompt, "x") for prompt in prompts]


def first_token_probabilities(prompt: str, temperature: float = 1.0) -> np.ndarray:
    ids = torch.tensor([encoder().prompt_ids(prompt, "x")])
    with torch.no_grad():
        return torch.softmax(SAMPLER(ids).logits[0, -1].double() / temperature, -1).numpy()


def counts(prompts: list[str], draws: int, seed: int = 0, **changes: Any) -> list[np.ndarray]:
    """How often each token came first."""
    e = encoder()
    config = SamplingConfig(**{"max_new_tokens": 1, "batch_size": 1000, **changes})
    found = []
    for drawn in sample(SAMPLER, e, encoded(e, prompts), draws, config, seed):
        assert len(drawn) == draws
        tally = Counter(d.ids[0] for d in drawn)
        found.append(np.array([tally[i] for i in range(30)]))
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_are_distributed_as_the_softmax(temperature):
    prompts = ["w1", "w2 w3 w4 w5", "w6 w7"]  # of different lengths: left-padded in one batch
    for prompt, tally in zip(prompts, counts(prompts, 3000, temperature=temperature), strict=True):
        expected = 3000 * first_token_probabilities(prompt, temperature)
        rare = expected < 5
        observed = np.append(tally[~rare], tally[rare].sum())
        wanted = np.append(expected[~rare], expected[rare].sum())
        assert chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    p = first_token_probabilities("w1")
    order = np.argsort(-p)
    size = int(np.searchsorted(np.cumsum(p[order]), 0.5)) + 1
    nucleus = np.zeros_like(p)
    nucleus[order[:size]] = p[order[:size]] / p[order[:size]].sum()
    (tally,) = counts(["w1"], 3000, top_p=0.5)
    expected = 3000 * nucleus
    assert not tally[expected == 0].any()
    assert chisquare(tally[expected > 0], expected[expected > 0]).pvalue > 1e-4


def test_a_temperature_near_zero_is_greedy():
    (tally,) = counts(["w1"], 50, temperature=1e-4)
    assert tally.max() == 50
    assert tally.argmax() == first_token_probabilities("w1").argmax()


def test_the_seed_fixes_the_texts_and_touches_nothing_else():
    e, config = encoder(), SamplingConfig(max_new_tokens=6, batch_size=7)
    prompts = encoded(e, ["w1", "w2 w3", "w4 w5 w6"])
    torch.manual_seed(5)
    first = sample(SAMPLER, e, prompts, 4, config, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    assert sample(SAMPLER, e, prompts, 4, config, seed=3) == first
    assert sample(SAMPLER, e, prompts, 4, config, seed=4) != first
    assert not SAMPLER.training


def test_samples_stop_at_the_context_and_at_the_longest_response():
    e = encoder(max_length=8)
    long, short = encoded(e, ["w1 w2 w3 w4"]), encoded(e, ["w1"])
    for drawn in sample(SAMPLER, e, long, 20, SamplingConfig(max_new_tokens=50), 0):
        assert max(len(d.ids) for d in drawn) == 8 - len(long[0])
    e.rows([example("w1", "w2", "w3")])
    for drawn in sample(SAMPLER, e, short, 20, SamplingConfig(), 0):
        assert max(len(d.ids) for d in drawn) == 2  # a word and the end


def test_ids_end_with_the_end_token_unless_they_were_cut_off():
    e = encoder()
    (drawn,) = sample(SAMPLER, e, encoded(e, ["w1"]), 400, SamplingConfig(max_new_tokens=3), 0)
    end = e.tokenizer.eos_token_id
    assert {d.ids[-1] == end for d in drawn} == {True, False}
    for d in drawn:
        assert end not in d.ids[:-1]
        assert len(d.ids) == 3 or d.ids[-1] == end
        assert d.text.split() == str(e.tokenizer.decode(d.ids, skip_special_tokens=True)).split()


def test_log_probs_of_samples_are_those_of_what_was_drawn():
    # E_pi[pi_ref / pi] = 1 over whatever is drawn, cut off or not
    other = build({"model_type": "llama", **ROTARY, "vocab_size": 30, "intermediate_size": 40})
    e = encoder()
    prompts = encoded(e, ["w1 w2"])
    (drawn,) = sample(SAMPLER, e, prompts, 4000, SamplingConfig(max_new_tokens=3, batch_size=4000), 0)
    rows = [TokenRow(prompts[0], [d.ids]) for d in drawn]
    ours, theirs = (torch.cat(all_logps(model, rows, Collator(0))) for model in (SAMPLER, other))
    ratio = (theirs - ours).exp()
    assert abs(float(ratio.mean()) - 1.0) < 4 * float(ratio.std()) / math.sqrt(len(ratio))
    assert float((ours - theirs).mean()) > 0.0
