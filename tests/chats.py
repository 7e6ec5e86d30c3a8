"""Tokenizers with the chat templates of published models."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import processors

from mopo_cli.config.schema import TokenizerConfig
from mopo_cli.models.tokenizers import train_tokenizer

TEXTS = ("the cat sat on the mat.", "a dog ran to the red house!", "is the sky blue today?") * 8
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
DIALOGUE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
ROLES = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"  # no generation prompt

# template, special tokens besides </s> and <bos>, whether <bos> is put in front of a text, the end of an answer
CHATS: dict[str, tuple[str, tuple[str, ...], bool, str]] = {
    "qwen base": (CHATML, ("<|im_start|>", "<|im_end|>"), False, "<|im_end|>"),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), True, "<end_of_turn>"),
    "phi-3": (PHI3, ("<|user|>", "<|assistant|>", "<|end|>"), False, "<|end|>"),
    "zephyr": (ZEPHYR, (), True, "</s>"),
    "llama 2": (LLAMA2, (), True, "</s>"),
    "dialogpt": (DIALOGUE, (), False, "</s>"),
    "roles": (ROLES, (), False, "</s>"),
}


@cache
def chat_tokenizer(name: str) -> Any:
    """A byte-level tokenizer with the template, special tokens and beginning of a published chat model."""
    template, special, begins, _ = CHATS[name]
    made = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=300))
    made.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": list(special)})
    if begins:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", made.bos_token_id)]
        )
    made.chat_template = template
    return made
