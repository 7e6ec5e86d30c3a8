"""What is masked where a command, an address or a config is written, and what is not."""

from __future__ import annotations

import pytest

from mopo_cli.base.secrets import MASK, holds_masked, masked, masked_command

HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("word", "secret"),
    [
        ("dataset.path=https://user:tok3n@host/rows.jsonl", "tok3n"),
        ("dataset.path=https://ghp_abcdefghijklmnop@github.com/a", "ghp_"),
        ("dataset.path=https://host/rows.jsonl?token=abc&x=1", "abc"),
        ("dataset.path=https://host/rows?X-Amz-Signature=abc&X-Amz-Date=1", "abc"),
        ("dataset.path=https://host/rows?sv=1&sig=abc", "abc"),
        ("run.name=hf_abcdefghijklmnopqrstuvwx", "hf_"),
        ("run.name=sk-abcdefghijklmnop1234", "sk-"),
        ("run.name=github_pat_abcdefghijklmnop1234", "github_pat_"),
        ("run.name=AKIAABCDEFGHIJKLMNOP", "AKIA"),
        (f"logger.key={HEX}", HEX),
        ("+dataset.api_key=abc def", "def"),
        ("+dataset.hf_token=abc", "abc"),
        ("dataset.password=abc", "abc"),
        ("aws_secret_access_key=x/y+z", "x/y"),
        ("dataset={path: a, token: abc, b: 1}", "abc"),
        ("dataset={path: a, b: {auth_token:abc}}", "abc"),
        ("+note=Authorization: Bearer abcdefghijklmnop", "abcdefgh"),
    ],
)
def test_a_secret_is_masked_in_a_command(word: str, secret: str):
    told = masked_command(["mopo", "train", word])
    assert MASK in told
    assert secret not in told


@pytest.mark.parametrize(
    "word",
    [
        "token_budget=8192",
        "tau=0.1",
        f"model.revision={HEX}",
        "sampling.max_new_tokens=12",
        "model.tokenizer.vocab_size=300",
        "objectives.secret.threshold=0.5",
        "dataset.path=hf://datasets/user/rows@main/a.jsonl",
        "dataset.path=https://host:8080/a@b.jsonl",
        "dataset.path=hh_rlhf",
        "run.name=risk-averse-and-more-than-long-enough",
        "logger.tags=[a,b]",
        "model.architecture={eos_token: </s>, eos_token_id: 2}",
    ],
)
def test_what_is_no_secret_stays(word: str):
    assert masked(word) == word


def test_values_are_masked_at_any_depth_by_their_keys_and_shapes():
    values = {"a": [{"api_key": "x", "eos_token": "</s>"}, ("https://u:p@h/x", 3)], "password": 12345, "token": None,
              "secret": {"role": "primary"}, "tau": 0.1, "on": True}  # fmt: skip
    assert masked(values) == {
        "a": [{"api_key": MASK, "eos_token": "</s>"}, (f"https://{MASK}@h/x", 3)], "password": MASK, "token": None,
        "secret": {"role": "primary"}, "tau": 0.1, "on": True}  # fmt: skip
    assert masked(masked(values)) == masked(values)
    assert holds_masked(masked(values))
    assert not holds_masked(values)
