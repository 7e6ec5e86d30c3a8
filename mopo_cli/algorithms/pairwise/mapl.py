"""MAPL: preferences between prompts, given a response, beside preferences between responses, given a prompt.

Source: arXiv 2505.12845; its parent, response-conditioned Bradley-Terry, is arXiv 2502.00814. Instructions that can be
checked by rule are put in front of prompts (data/instructions.py), and the loss on the original pairs is joined by

    intra-sample:  -log s(r(x_w, y) - r(x_l, y)),  y following more of the instructions of x_w than of x_l
    inter-sample:  -log s([r(x_1, y) - r(x_1, y')] - [r(x_2, y) - r(x_2, y')]),  x_1 favouring y more than x_2 does

For the preference model r is its value of each objective; for the policy r(x, y) = tau log pi(y|x) / pi_ref(y|x), where
the reference sees the same instructions. The paper's inter-sample loss and the weights of the three could not be
confirmed. The reading of margins is the default: what a policy defines as r(x, y) is known up to a function of x only
(DPO's log-partition function), which margins do not contain. `across: responses` is the other reading, r(x_1, y) over
r(x_2, y') where y follows more of its instructions than y' of its own. The loss is the mean over original pairs plus
`intra` and `inter` times the means over their comparisons.

The intra-sample loss compares absolute log-probs of the data's responses across prompts, so a policy can lower it by
taking mass from all of them behind x_l, which shows behind plain prompts too: in the embedded world (one seed) factors
of 1, 0.1 and 0.01 left 39, 29 and 63 % of the mass on the world's responses, none at all 81 %. Hence its small default;
a preference model, which has no mass to lose, has factors of its own.

The parent's finding that one must augment both sides, preferred responses that violate instructions and others that
satisfy them, is met by writing instructions without a look at labels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from mopo_cli.algorithms.contract import Aligned
from mopo_cli.algorithms.pairwise.batches import Beside, aligned_on_pairs, judged, used_objectives
from mopo_cli.algorithms.pairwise.comparisons import ToldTask, index_of, model_margins, policy_margins
from mopo_cli.algorithms.pairwise.dpo import Dpo
from mopo_cli.algorithms.pairwise.instructions import (
    KINDS,
    Instruction,
    Telling,
    Told,
    inter_margins,
    inter_responses,
    write,
)
from mopo_cli.base.console import say, stage, warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json, whole, write_json
from mopo_cli.base.types import Example
from mopo_cli.config.checks import at_least, between, checked, one_of
from mopo_cli.config.schema import PreferenceModelConfig, SamplingConfig
from mopo_cli.data.batches import batch_rows
from mopo_cli.data.encoder import content
from mopo_cli.models.policy import Policy
from mopo_cli.models.preference import (
    PreferenceModel,
    build_preference_model,
    load_preference_model,
    save_preference_model,
)
from mopo_cli.training import keys
from mopo_cli.training.cache import kept, kept_logps
from mopo_cli.training.checkpoints import Setting
from mopo_cli.training.loop import Task, joined
from mopo_cli.training.preference import JUDGED, accuracy, heldout_logits, labelled_task, train_preference_model
from mopo_cli.training.reference import limited_steps
from mopo_cli.training.stage import Notes, rows_a_step, step_rows

MEASURED = 32  # told rows that go through the preference model at once
ACROSS = {"margins": inter_margins, "responses": inter_responses}


# --------------------------------------------------------------------------------------------- the method
@dataclass(frozen=True, slots=True)
class Accuracies:
    """Of a preference model on held-out rows, (K,) each: labelled pairs, and comparisons of instructions."""

    plain: list[float]
    intra: list[float]
    inter: list[float]


FittedJudge = tuple[PreferenceModel, dict[str, Accuracies]]


def read_accuracies(record: Mapping[str, list[float | None]]) -> Accuracies:
    """What JSON has kept of them: its null is NaN, of an objective without a decided label."""
    return Accuracies(**{name: [math.nan if v is None else v for v in values] for name, values in record.items()})


FACTOR = at_least(0, "a number, 0 or more")


@dataclass(frozen=True)
class Factors:
    """What the mean losses of both kinds of comparisons count for."""

    intra: Annotated[float, FACTOR] = 0.0
    inter: Annotated[float, FACTOR] = 0.0

    def above_zero(self) -> dict[str, float]:
        return {name: float(value) for name, value in asdict(self).items() if value > 0}


def _kinds(kinds: Sequence[str] | None) -> tuple[str, ...]:
    """Those named, or all; UserError where one is none."""
    if kinds is None:
        return tuple(KINDS)
    if isinstance(kinds, str):
        raise UserError(f"algorithm.kinds={kinds}: must be a list, as [{kinds}], or null for all")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        wrong = f"no kind of instruction {unknown[0]}" if unknown else "no kind of instruction"
        raise UserError(f"algorithm.kinds: {wrong}; must be of {', '.join(KINDS)}, or null for all")
    return tuple(kinds)


@dataclass(frozen=True)
class Mapl:
    """The settings of algorithm=mapl.

    A step has as many rows as one of algorithm=dpo; a share `augmented` of them are told instructions, two rows of one
    prompt at a time. Rows that do not fit the context behind their instructions are left out of the told ones only, so
    that training and test rows are those of every other method; the policy is asked and judged without instructions.
    """

    names: tuple[str, ...]
    tau: float
    weights: Mapping[str, float] | None = None
    smoothing: float = 0.0
    intra: Annotated[float, FACTOR] = 0.01
    inter: Annotated[float, FACTOR] = 1.0
    across: Annotated[str, one_of(*ACROSS)] = "margins"
    augmented: Annotated[float, between(0, 1, "[", be="in [0, 1), a share of each step's rows")] = 0.5
    instructions: Annotated[int, at_least(1, "a whole number, 1 or more")] = 3
    kinds: Sequence[str] | None = None
    preference_model: Mapping[str, float] | None = None

    longest_condition = ""

    def __post_init__(self) -> None:
        checked(self, "algorithm.")
        for name in self.preference_model or {}:
            if name not in ("intra", "inter"):
                raise UserError(f"algorithm.preference_model.{name}: no such key; must be intra or inter")
        checked(self.judge_factors, "algorithm.preference_model.")
        object.__setattr__(self, "kinds", _kinds(self.kinds))
        _ = self.dpo  # which raises where a setting is wrong

    @property
    def judge_factors(self) -> Factors:
        return Factors(**self.preference_model or {})

    @property
    def dpo(self) -> Dpo:
        return Dpo(self.names, self.tau, weights=self.weights, smoothing=self.smoothing)

    @property
    def factors(self) -> dict[str, float]:
        return Factors(self.intra, self.inter).above_zero()

    @property
    def judging(self) -> dict[str, float]:
        return self.judge_factors.above_zero()

    def align(self, setting: Setting) -> Aligned:
        told = bool(self.factors) and self.augmented > 0
        if self.judging and self.augmented > 0:
            self.judge_with_instructions(setting)
        beside = self.beside(setting) if told else None
        aligned = aligned_on_pairs(setting, self.dpo.pair_fit("mapl", beside=beside))
        if told:
            self.measure(setting)
        return aligned

    def telling(self, setting: Setting) -> Telling:
        return Telling(self.instructions, _kinds(self.kinds), ACROSS[self.across], setting.config.seed)

    def doubles(self, rows: int, key: str) -> int:
        """How many prompts of a step are told instructions, each twice: one at least, and a row is left that is not."""
        if rows < 3:
            raise UserError(
                f"{key}: a step of {rows} rows has no room for a plain one and two with instructions; give it 3 or "
                "more, or set algorithm.augmented=0"
            )
        return min(max(round(rows * self.augmented / 2), 1), (rows - 1) // 2)

    def told(self, setting: Setting, split: str, most: int, kinds: Collection[str]) -> list[Told]:
        """At most so many rows of a split, drawn by the seed, behind instructions that give these kinds of comparisons.

        Says how many rows do not fit; UserError where none is left.
        """
        inputs, config, telling = setting.inputs, setting.config, self.telling(setting)
        examples, tokens = inputs.examples[split], inputs.tokens[split]
        numbers = np.random.default_rng([config.seed, 29]).permutation(len(examples))[:most].tolist()
        rows: list[Told] = []
        silent = overlong = 0
        with stage("instructions", len(numbers), brief=True) as progress:
            for done, i in enumerate(numbers, start=1):
                row = telling.told(inputs.policy.encoder, examples[i], tokens[i], i)
                if row is None or not any(getattr(row, name) for name in kinds):
                    silent += 1
                elif not row.fits(inputs.policy.encoder.max_length):
                    overlong += 1
                else:
                    rows.append(row)
                if done % 100 == 0:
                    progress.advance(done)
            progress.advance(len(numbers))
        if not rows:
            raise UserError(
                f"algorithm.kinds: none of {len(numbers)} {split} rows can be told instructions: {overlong} do not fit "
                f"the context behind them (model.max_length), and in {silent} nothing can be compared"
            )
        if overlong:
            warn(f"{overlong} of {len(numbers)} {split} rows do not fit the context behind instructions; not told any")
        return rows

    def beside(self, setting: Setting) -> Beside:
        """The told rows of each step, with the reference's log-probs of those that are visited."""
        config, inputs = setting.config, setting.inputs
        count = self.doubles(rows_a_step(setting), "batch_size")
        told = self.told(setting, "train", config.steps * count, self.factors)
        taken = step_rows(setting, len(told), count)
        visited = sorted({i for step in range(config.steps) for i in taken(step)})
        rows = [row for i in visited for row in told[i].rows]
        logps = kept_logps(setting.accelerator, config.cache, inputs.policy, rows)
        reference = {i: torch.stack(logps[2 * n : 2 * n + 2]) for n, i in enumerate(visited)}
        margins = policy_margins(inputs.policy.model, told, reference, self.tau, inputs.policy.collate)
        used = used_objectives(self.dpo.shares)
        pairs = [n for n in (len(judged(example, used)) for example in inputs.examples["train"]) if n]
        plain = (rows_a_step(setting) - 2 * count) * float(np.mean(pairs or [0]))
        notes = Notes()
        task = ToldTask(told, self.factors, margins, taken, plain, count, notes)
        return Beside(task.task, 2 * count, notes)

    def measure(self, setting: Setting) -> None:
        """Says and logs how often an instruction is followed that a response of the data follows."""
        config, inputs = setting.config, setting.inputs
        examples = inputs.examples["heldout"][: config.evaluation.prompts]

        def share(told: bool) -> float:
            return share_followed(inputs.policy, examples, _kinds(self.kinds), config.sampling, config.seed, told)

        ours, untold = share(True), share(False)
        with inputs.policy.swapped(setting.initial):
            theirs = share(True)
        setting.tracker.log(
            config.steps, **{"followed/told": ours, "followed/untold": untold, "followed/reference": theirs}
        )
        say(f"instructions followed: {ours:.1%}; by the reference {theirs:.1%}; without being told {untold:.1%}")

    # ----------------------------------------------------------------------------------------- the preference model

    def judge_with_instructions(self, setting: Setting) -> None:
        """The preference model fitted anew with the losses on instructions, left in the run's stages/preference_model.

        It stands beside the run's own, which goes on to judge, so that all methods are judged alike.
        """
        config, inputs, accelerator = setting.config, setting.inputs, setting.accelerator
        own, names = setting.run.path / "stages" / "preference_model", inputs.data.names
        steps = limited_steps(config.preference_model, len(inputs.tokens["train"]))
        settings = replace(config.preference_model, steps=steps)
        own_settings = self.judging, self.across, self.augmented, self.instructions, self.kinds
        about = (asdict(settings), *own_settings, config.model.max_length)

        def key() -> str:
            return keys.policy_key(config, inputs, setting.judge, "mapl-preference-model", about)

        def fit() -> FittedJudge:
            model = build_preference_model(
                inputs.policy.model, len(names), settings.form, settings.skew_rank, config.seed
            )
            heldout = self.told(setting, "heldout", JUDGED, ("intra", "inter"))
            before = self.accuracies(setting, setting.judge, heldout)
            held = inputs.examples["heldout"], inputs.tokens["heldout"]
            task = self.preference_task(setting, model, settings)
            with stage("preference model (mapl)", steps) as progress:
                train_preference_model(accelerator, model, task, held, inputs.policy.collate, settings, progress)
            return model, {"before": before, "after": self.accuracies(setting, model, heldout)}

        def save(fitted: FittedJudge, path: Path) -> None:
            model, accuracies = fitted
            with whole(path) as place:
                save_preference_model(model, place / "model", names, accuracies["after"].plain)
                write_json(place / "accuracy.json", {name: asdict(each) for name, each in accuracies.items()})

        def load(path: Path) -> FittedJudge:
            model, _ = load_preference_model(path / "model", inputs.policy.model)
            return model, {n: read_accuracies(each) for n, each in read_json(path / "accuracy.json").items()}

        own.parent.mkdir(parents=True, exist_ok=True)
        _, accuracies = kept(accelerator, config.cache, key, fit, save, load, own)
        before, after = accuracies["before"], accuracies["after"]
        say("preference model with instructions, held-out accuracy without them -> with them:")
        for what in ("plain", "intra", "inter"):
            values = zip(names, getattr(before, what), getattr(after, what), strict=True)
            title = "pairs" if what == "plain" else f"{what}-sample comparisons"
            say(f"  {title}: " + ", ".join(f"{name} {a:.1%} -> {b:.1%}" for name, a, b in values))

    def preference_task(self, setting: Setting, model: PreferenceModel, settings: PreferenceModelConfig) -> Task:
        """Labelled pairs, with told rows in some of a step's places: every objective's value is to follow them."""
        inputs, seed = setting.inputs, setting.config.seed
        examples, rows = inputs.examples["train"], inputs.tokens["train"]
        size = settings.batch_size * setting.accelerator.num_processes
        count = self.doubles(size, "preference_model.batch_size")
        told = self.told(setting, "train", settings.steps * count, self.judging)
        plain = labelled_task(
            setting.accelerator,
            model,
            (examples, rows),
            inputs.policy.collate,
            lambda step: batch_rows(len(rows), size - 2 * count, seed, step),
        )
        margins = model_margins(model, told, inputs.policy.collate)
        labels = plain.weight_of(list(range(len(rows)))) / len(rows) * (size - 2 * count)
        taken = step_rows(setting, len(told), count)
        beside = ToldTask(told, self.judging, margins, taken, labels / len(inputs.data.names), count)
        return joined(plain, beside.task, len(rows))

    @torch.no_grad()
    def accuracies(self, setting: Setting, model: PreferenceModel, told: Sequence[Told]) -> Accuracies:
        """On all held-out pairs, and on the comparisons of held-out rows that are told instructions."""
        inputs = setting.inputs
        heldout = inputs.examples["heldout"], inputs.tokens["heldout"]
        plain = accuracy(*heldout_logits(model, *heldout, inputs.policy.collate))
        of = model_margins(model.eval(), told, inputs.policy.collate)
        right: dict[str, list[Tensor]] = {"intra": [], "inter": []}
        for start in range(0, len(told), MEASURED):
            numbers = range(start, min(start + MEASURED, len(told)))
            margins = of(numbers)
            for name, found in right.items():
                found.append(margins(index_of([getattr(told[i], name) for i in numbers])).cpu() > 0)
        intra, inter = (torch.cat(found).float().mean(0).tolist() for found in right.values())
        return Accuracies(plain, intra, inter)


# --------------------------------------------------------------------------------------------- what is followed
def asked_instructions(
    examples: Sequence[Example], kinds: Sequence[str], seed: int
) -> list[tuple[Example, Instruction]]:
    """An instruction for each example that one of its responses meets; not all have one of a kind drawn at random."""
    found = []
    for number, example in enumerate(examples):
        rng = np.random.default_rng([seed, number, 23])
        responses = [content(response) for response in example.responses]
        chosen = responses.pop(int(rng.integers(len(responses))))
        one = write(kinds[int(rng.integers(len(kinds)))], chosen, True, responses, rng)
        if one is not None:
            found.append((example, one))
    return found


def share_followed(
    policy: Policy,
    examples: Sequence[Example],
    kinds: Sequence[str],
    sampling: SamplingConfig,
    seed: int,
    told: bool,
) -> float:
    """How often a sampled response follows an instruction, with it in front of the prompt or without; NaN of none.

    Each is one that a response of the data to the same prompt follows, so that it can be met.
    """
    asked, encoder = asked_instructions(examples, kinds, seed), policy.encoder
    ids = [
        encoder.conditioned(one.text if told else "").prompt_ids(e.prompt, *(e.responses or ("x",))) for e, one in asked
    ]
    fits = [i for i, each in enumerate(ids) if len(each) + encoder.longest_response <= encoder.max_length]
    if not fits:
        return math.nan
    drawn = policy.sample([ids[i] for i in fits], 1, sampling, seed)
    return sum(asked[i][1].met(one[0].text) for i, one in zip(fits, drawn, strict=True)) / len(fits)
