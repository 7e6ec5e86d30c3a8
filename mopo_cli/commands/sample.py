"""`mopo sample`: responses of a trained model to a person's own prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from mopo_cli.base.console import say, warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.text import is_unicode
from mopo_cli.base.types import Corpus, Example, Text
from mopo_cli.config import compose
from mopo_cli.config.schema import SampleConfig
from mopo_cli.data.directions import directions_of, parsed
from mopo_cli.data.prepare import as_text, resolve_objectives
from mopo_cli.data.readers import SUFFIXES, read_rows
from mopo_cli.data.rows import prompt_in
from mopo_cli.evaluation.entrants import MODEL_FILES, Entrant, finished_run
from mopo_cli.evaluation.loading import encoder_of, load_policy, load_run, model_of
from mopo_cli.evaluation.prompts import in_form_of, known_example
from mopo_cli.evaluation.records import Models
from mopo_cli.evaluation.responses import POLICY_SEED, REFERENCE_SEED, sampled_responses
from mopo_cli.judging.judges import JudgedResponses, PreferenceFeatures, own_judge, win_rates
from mopo_cli.runs.find import newest_run
from mopo_cli.runs.session import quiet_libraries

Rates = dict[str, list[np.ndarray]]  # by objective, (n,) win rates of each prompt's responses


def command(composed: DictConfig, prompt: str | None = None) -> int:
    """Print responses. `prompt` is the text of prompt=, which is no config: any character may stand in it."""
    settings: SampleConfig = compose.typed(composed, SampleConfig)
    prompts = asked_prompts(settings, prompt)
    entrant = entrant_of(settings)
    condition = condition_of(entrant, settings.direction)
    quiet_libraries()
    models, features = load_models(settings, entrant)
    examples = [example_of(settings, entrant, text) for text in prompts]
    limit = models.policy.encoder.max_length
    for example, text in zip(examples, prompts, strict=True):
        size = len(models.policy.encoder.conditioned(condition).prompt_ids(example.prompt, *example.responses))
        if size >= limit:
            raise UserError(
                f"prompt {as_text(text)[:40]!r}: its {size} tokens fill the context of {limit} (model.max_length)"
            )
    seed = settings.seed + POLICY_SEED
    responses = sampled_responses(models.policy, examples, settings.n, settings.sampling, seed, condition)
    rates = judged(settings, entrant, models, features, examples, responses) if features else {}
    if condition:
        say(f"told: {condition}")
    for i, text in enumerate(prompts):
        if len(prompts) > 1:
            say(("" if i == 0 else "\n") + f"> {as_text(text)}")
        for m, response in enumerate(responses.texts[i]):
            mark = f"[{m + 1}]  " if settings.n > 1 else ""
            line = mark + "  ".join(f"{name} {of_prompts[i][m]:.2f}" for name, of_prompts in rates.items())
            if line:
                say(line.rstrip())
            say(response)
    return 0


def asked_prompts(settings: SampleConfig, prompt: str | None) -> list[Text]:
    """The prompts of the command line, of standard input or of a file; UserError where there is none."""
    if (prompt is None) == (settings.prompts is None):
        both = "both prompt and prompts are" if prompt is not None else "neither prompt nor prompts is"
        raise UserError(f'{both} set; give one, as prompt="How do I boil an egg?", prompt=- or prompts=FILE')
    if settings.prompts is not None:
        return prompts_of(settings.prompts)
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else str(prompt)
    if not text.strip():
        raise UserError("prompt: is empty")
    if not is_unicode(text):
        raise UserError("prompt: is not UTF-8")
    return [text]


def prompts_of(file: str) -> list[Text]:
    """One prompt a line of a text file; of a file that data sets come in, the prompt of each row, read as theirs."""
    path = Path(file).expanduser()
    if path.name.endswith(SUFFIXES) and path.is_file():
        prompts: list[Text] = [prompt_in(row, where) for where, row in read_rows(str(path))]
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompts={path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts={path}: holds no prompts")
    return prompts


def entrant_of(settings: SampleConfig) -> Entrant:
    """The run, or plain model, that responds."""
    if settings.run is None and settings.model.path is not None:
        return Entrant(Path(settings.model.path).name, settings.model.path, "model")
    path = Path(settings.run).expanduser() if settings.run else newest_run()
    if any((path / name).is_file() for name in MODEL_FILES):
        return Entrant(path.name, str(path), "model")
    return finished_run(str(path), allow_code=settings.allow_code)


def condition_of(entrant: Entrant, direction: str | None) -> str:
    """What the policy is told: as its run was evaluated, or for a direction; UserError where it takes none."""
    if direction is None:
        return entrant.condition
    directions = directions_of(entrant.model)
    if directions is None:
        raise UserError(
            f"direction={direction}: {entrant.path} takes no direction; policies trained by algorithm=dpa, "
            "ric or mopo_conditioned do"
        )
    return directions.condition(parsed(direction))


def load_models(settings: SampleConfig, entrant: Entrant) -> tuple[Models, PreferenceFeatures | None]:
    """What responds; of a run with its reference and preference model, where there is one and it is to judge."""
    model = model_of(entrant, settings.model)
    encoder = encoder_of(entrant, model)
    if entrant.trained is None:
        return Models(load_policy(model, encoder, settings.seed), {}), None
    judges = bool(settings.compare) and (entrant.run.preference_model / "preference_model.json").is_file()
    return load_run(entrant, encoder, judges, compared=judges)


def example_of(settings: SampleConfig, entrant: Entrant, prompt: Text) -> Example:
    """The prompt in the form that the model knows, with what stands for a response, which tells how a prompt ends.

    Messages have their form already.
    """
    example, response = known_example(entrant.run) if entrant.trained else ("", "x")
    if not isinstance(prompt, str):
        return Example(prompt, (response,), (), ())
    chat = settings.chat
    text: Text = [{"role": "user", "content": prompt}] if chat else prompt
    if chat is None:
        text = in_form_of(prompt, example)
    return Example(text, (response,), (), ())


def judged(
    settings: SampleConfig,
    entrant: Entrant,
    models: Models,
    features: PreferenceFeatures,
    examples: Sequence[Example],
    responses: JudgedResponses,
) -> Rates:
    """Win rates of each response, by objective, against samples of the run's reference."""
    assert entrant.trained is not None
    seed = settings.seed + REFERENCE_SEED
    with models.policy.swapped(models.initial):
        reference = sampled_responses(models.policy, examples, settings.compare, settings.sampling, seed)
    nodes = entrant.trained.objectives
    objectives = resolve_objectives(nodes, Corpus(tuple(node.source or name for name, node in nodes.items()), ()))
    rates = {}
    for objective in objectives:
        judge = own_judge(objective, None, features)
        try:
            measures = [judge.measure(examples, of) for of in (responses, reference)]
        except UserError as error:  # a function that needs the row's context, which a person's prompt has not
            warn(str(error))
            continue
        rates[objective.name] = win_rates(judge, *measures)
    if rates:
        say(f"win rates against {settings.compare} samples of the reference, by the run's own judges")
    return rates
