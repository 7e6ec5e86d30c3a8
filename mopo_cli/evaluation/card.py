"""The model card of a run: what it was aligned to, what was measured, where the labels come from, how to use it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from mopo_cli.base.secrets import masked
from mopo_cli.base.text import one_line, prompts_told
from mopo_cli.data.directions import Directions, Levels, weighed
from mopo_cli.runs.constraints import Constraint, asked_of, constraints_of, known_oracle, out_of_reach, verdict_of

UNDECIDED = {True: "undecided (the interval holds the threshold)", False: "undecided (too few test prompts)"}


def model_card(
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
    provenance: Mapping[str, Any],
    adapter: bool = False,
    prompt: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    directions: Directions | Levels | None = None,
) -> str:
    """Markdown with the hub's metadata in front.

    settings: the run's config. summary, provenance: its summary.json and provenance.json. adapter: whether the folder
    holds a LoRA adapter alone. prompt: an example in the form that the model knows. evaluation: a later
    evaluation.json. directions: what a policy that is told the user's wishes understands.
    """
    model, measured = settings["model"], evaluation or summary
    base = str(model.get("path") or model.get("name") or "a model from scratch")
    lines = ["---", yaml.safe_dump(_metadata(model, adapter), sort_keys=False).strip(), "---", ""]
    lines += [f"# {_text(settings['run']['name'])}", ""]
    lines += [
        f"Aligned from `{_code(base)}` with mopo {summary['versions']['mopo']} ({_method(settings, summary)}tau "
        f"{settings['tau']:g}, {summary['train']['steps']} steps, seed {summary['seed']}): "
        f"{_aim(settings, summary, measured)}.",
        "",
        *_objectives(measured),
        *_beside(measured),
        "",
        "A win rate is how often a response beats the data's responses to the same prompt; 0.5 is parity. "
        f"{_measured_on(measured)}Intervals are of 95 % confidence for the luck of the prompts that were asked; an "
        "error of a judge is not in them.",
        "",
    ]
    if summary.get("condition"):
        lines += _condition(str(summary["condition"]), directions)
    if prompt is not None:
        lines += _usage(adapter, prompt)
    if summary.get("warnings"):
        lines += ["## Warnings of the run", "", *(f"- {_text(text)}" for text in summary["warnings"]), ""]
    lines += ["## Data and labels", "", *(f"- {_text(k)}: {_text(v)}" for k, v in provenance.items()), ""]
    lines += ["## Reproduce", "", f"    {one_line(summary.get('command', ''))}", ""]
    return masked("\n".join(lines))


def _metadata(model: Mapping[str, Any], adapter: bool) -> dict[str, Any]:
    tags = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    base = model.get("path")
    on_hub = base and not str(base).startswith(("/", ".", "~")) and str(base).count("/") == 1
    return {**tags, **({"base_model": str(base)} if on_hub else {}), "tags": ["mopo", "preference-optimization"]}


def _method(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The method's name, with a comma; nothing of a run of old that does not tell."""
    name = summary.get("algorithm") or (settings.get("algorithm") or {}).get("name")
    return f"{_text(name)}, " if name else ""


def _aim(settings: Mapping[str, Any], summary: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """What was asked of the model: as its algorithm says, else its primary objective under thresholds, each with what
    became of it where it is not surely kept."""
    objectives = summary["objectives"]
    primary = next((name for name, o in objectives.items() if o["role"] == "primary"), "its objective")
    aim = summary.get("aim")
    if aim is None:
        aim = _earlier_aim(settings.get("algorithm") or {}, primary)
    later = {
        n: o for n, o in measured["objectives"].items() if o.get("threshold") == objectives.get(n, {}).get("threshold")
    }
    asked = asked_of(settings) or {name: o["threshold"] for name, o in objectives.items()}
    constraints = constraints_of({**objectives, **later}, measured.get("oracle"), asked)
    bounds = " and ".join(map(_bound, constraints))
    return _text(aim or f"as {primary} as possible" + (f", with {bounds}" if bounds else ""))


def _bound(constraint: Constraint) -> str:
    own = "" if constraint.asked else ", which the run set itself"
    became = "" if constraint.verdict in ("yes", "") else f" ({constraint.outcome})"
    return f"{constraint.name} at least {constraint.threshold:.3f}{own}{became}"


def _earlier_aim(algorithm: Mapping[str, Any], primary: str) -> str:
    """What the algorithms of version 0.1 would have said, whose summaries have no aim."""
    if not {"weights", "direction"} & algorithm.keys():
        return ""
    alike = algorithm.get("name") in ("modpo", "soups", "dpa", "ric")
    return weighed(algorithm) or ("all objectives weighed alike" if alike else f"as {primary} as possible")


def _objectives(measured: Mapping[str, Any]) -> list[str]:
    """The table of win rates; without columns about thresholds where none was asked."""
    bounded = any(o["threshold"] is not None for o in measured["objectives"].values())
    heads = ["objective", "role", *["threshold"] * bounded, "win rate", "95 % CI", *["kept"] * bounded, "judged by"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, o in measured["objectives"].items():
        low, high = (math.nan if end is None else end for end in o["win_rate_ci95"])
        known = not math.isnan(low)
        cells = {
            "objective": _text(name),
            "role": o["role"],
            "threshold": "" if o["threshold"] is None else f"{o['threshold']:.3f}",
            "win rate": f"{o['win_rate']:.3f}",
            "95 % CI": f"{low:.3f} to {high:.3f}" if known else "",
            "kept": UNDECIDED[known] if (kept := verdict_of(o)) == "undecided" else kept,
            "judged by": _text(o["judge"]),
        }
        lines.append(f"| {' | '.join(cells[head] for head in heads)} |")
    return lines


def _beside(measured: Mapping[str, Any]) -> list[str]:
    lines = []
    if measured.get("kl") is not None:
        lines += ["", f"KL to the reference: {measured['kl']:.3f} nats a response."]
    if measured.get("oracle"):
        exact = ", ".join(f"{_text(name)} {value:.3f}" for name, value in measured["oracle"]["win_rate"].items())
        mass = measured["oracle"].get("support_mass")
        only = "" if mass is None else f" (of the world's responses, {mass:.1%} of what the policy says)"
        lines += ["", f"Exact win rates{only}: {exact}."]
    oracle = known_oracle(measured)
    if not oracle.get("feasible", True):
        bounds = {n: o["threshold"] for n, o in measured["objectives"].items() if o["threshold"] is not None}
        reason = out_of_reach(bounds, oracle.get("attainable") or {}, oracle.get("shortfall"))
        lines += ["", f"No policy keeps these thresholds: {_text(reason)}."]
    return lines


def _measured_on(measured: Mapping[str, Any]) -> str:
    """How many prompts the numbers rest on: as summary.json or evaluation.json has it; nothing of a run of old."""
    asked = measured.get("evaluation") or measured
    if "independent_prompts" not in asked:
        return ""
    return f"It was measured on {prompts_told(asked['prompts'], asked['independent_prompts'])}. "


def _condition(condition: str, directions: Directions | Levels | None) -> list[str]:
    """What stands in front of a prompt, and what else may stand there."""
    lines = [
        "## What the model is told",
        "",
        f"A line in front of the prompt, or of a conversation's system message, says what is wanted: "
        f"`{_code(condition)}` where the numbers above were measured.",
    ]
    if directions is None:
        return [*lines, ""]
    examples = directions.examples
    lines += [
        f"It knows {_text(directions.span)}. What is wanted becomes such a line:",
        "",
        "| direction | line |",
        "|---|---|",
        *(f"| {_direction(weights)} | `{_code(directions.condition(weights))}` |" for weights in examples),
        "",
        "Responses at a direction, with this folder or the run's:",
        "",
        f'    mopo sample run=. direction="{_direction(examples[-1])}" prompt="How do I boil an egg?"',
        "",
    ]
    return lines


def _direction(weights: Mapping[str, float]) -> str:
    return ",".join(f"{name}={weight:g}" for name, weight in weights.items())


def _usage(adapter: bool, prompt: str) -> list[str]:
    needs = " (with peft installed, which loads the base model below the adapter)" if adapter else ""
    return [
        "## Use",
        "",
        f"The model goes on after a prompt of this form{needs}:",
        "",
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        '    path = "."  # this folder, or its id on the hub',
        "    tokenizer = AutoTokenizer.from_pretrained(path)",
        "    model = AutoModelForCausalLM.from_pretrained(path)",
        f'    inputs = tokenizer({prompt!r}, return_tensors="pt")',
        "    output = model.generate(**inputs, do_sample=True, max_new_tokens=256)",
        '    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        "",
    ]


def _text(value: object) -> str:
    """A value as text of one line: no mark-up, no cell border."""
    return one_line(str(value)).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _code(value: object) -> str:
    return one_line(str(value)).replace("`", "'")
