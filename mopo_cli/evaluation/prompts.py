"""A person's prompt in the form that a model was trained on."""

from __future__ import annotations

from mopo_cli.base.console import warn
from mopo_cli.base.files import read_lines
from mopo_cli.base.types import Text
from mopo_cli.config import compose, schema
from mopo_cli.data.encoder import Encoder
from mopo_cli.evaluation.loading import reading
from mopo_cli.models.tokenizers import saved_tokenizer
from mopo_cli.runs.directory import RunDirectory

LAST_TURN = "\n\nAssistant:"
TURNS = ("Human: ", "System: ", "Assistant: ")


def in_form_of(prompt: str, example: str) -> Text:
    """The prompt as the data have theirs, told from one of them: plain, a transcript, or messages.

    Messages are kept in files as a transcript without the two newlines in front (data/prepare.py).
    """
    if not example.endswith(LAST_TURN) or prompt.endswith(LAST_TURN):
        return prompt
    if example.startswith("\n\n"):
        return f"\n\nHuman: {prompt.strip()}{LAST_TURN}"
    return [{"role": "user", "content": prompt}] if example.startswith(TURNS) else prompt


def known_example(run: RunDirectory) -> tuple[str, str]:
    """A prompt of the run's data, and what stands for a response: most of its samples show whether they start apart.

    Where the data's responses start with white space, none is put between prompt and response (Encoder.prompt_text).
    """
    rows = read_lines(run.samples)[:200]
    if not rows:
        warn(
            f"{run.samples}: tells no prompt, so that nobody knows the form of the data's; yours is asked as it stands"
        )
    apart = sum(str(row.get("response", ""))[:1].isspace() for row in rows)
    return str(rows[0].get("prompt", "")) if rows else "", " x" if 2 * apart > len(rows) else "x"


def framed_text(run: RunDirectory, prompt: str, condition: str = "") -> str:
    """The text that stands in front of a response to `prompt`, which is asked behind `condition`."""
    from omegaconf import OmegaConf

    model = compose.typed(OmegaConf.create(run.settings()), schema.TrainConfig).model
    with reading(run.model):
        tokenizer = saved_tokenizer(run.model, model.trust_remote_code)
    encoder = Encoder(tokenizer, model.max_length, model.chat_template, condition)
    example, response = known_example(run)
    return encoder.prompt_text(in_form_of(prompt, example), response)
