"""The page: one HTML file that holds its data, its charts and their library, and asks the network for nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mopo_cli import __version__
from mopo_cli.base.secrets import masked, masked_command
from mopo_cli.base.text import prompts_told
from mopo_cli.report import groups, theme
from mopo_cli.report.groups import Figure, Group
from mopo_cli.report.quality import Quality
from mopo_cli.runs.constraints import OWN_MARK, OWN_NOTE, WORDS
from mopo_cli.runs.record import METHOD, Result, RunRecord, shown, value_of, varying_settings

SAMPLE_BUDGET = 1_000_000  # characters of responses in a page
LONGEST = 4000  # characters shown of one text
COLUMNS = 6  # settings that the table shows; the CSV has all
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Section:
    """The runs of one objective set with their figures and numbers."""

    group: Group
    figures: Sequence[Figure]
    data: Mapping[str, list[dict[str, Any]]]  # of the figures
    quality: Quality | None


@dataclass(frozen=True, slots=True)
class Report:
    """What a page is made of."""

    title: str
    kind: str  # run, sweep or comparison
    place: str
    runs: Sequence[RunRecord]
    sections: Sequence[Section]
    notices: Sequence[str]
    prompts: int  # shown side by side


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table: what is read, and what it is sorted by."""

    text: str = ""
    value: float | str = ""
    mark: str = ""  # "yes" or "no": a verdict


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    numeric: bool = True
    help: str = ""


def render(report: Report) -> str:
    """The HTML of a report."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    columns, rows = table(report)
    common = common_settings(report.runs)
    return environment.get_template("page.html").render(
        report=report,
        version=__version__,
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
        states=Counter(run.state for run in report.runs).most_common(),
        columns=columns,
        rows=rows,
        objectives=objective_table(report.runs[0]) if len(report.runs) == 1 else None,
        methods=varying_settings(report.runs).get(METHOD, []) if len(report.runs) > 1 else [],
        facts=facts(report.runs[0]) if len(report.runs) == 1 else [],
        planes=[groups.plane(section.group) for section in report.sections],
        numbers=[numbers(section.quality) if section.quality else [] for section in report.sections],
        warned=[run for run in report.runs if run.warnings or run.problem],
        config=config_text(report, common),
        own={run.id: own_settings(run, common) if len(report.runs) > 1 else [] for run in report.runs},
        commands={run.id: command_of(run) for run in report.runs},
        styles=(HERE / "page.css").read_text(encoding="utf-8"),
        light=_variables(theme.LIGHT),
        dark=_variables(theme.DARK),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        library=library().replace("</script", "<\\/script"),
        data=embedded(payload(report, columns, rows)),
    )


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def embedded(value: Any) -> str:
    """JSON that is safe inside a script element whatever its texts are."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda sign: f"\\u{ord(sign.group()):04x}", text)


def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; bundling takes seconds, so it is kept in the user's cache."""
    import vl_convert

    versions = f"{version('vl-convert-python')}-{vl_convert.get_vega_version()}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = root / "mopo" / f"vega-{versions}.js"
    try:
        return cached.read_text(encoding="utf-8")
    except OSError:
        script = vl_convert.javascript_bundle()  # type: ignore[call-arg] (its stub asks for more)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(script, encoding="utf-8")
        temporary.replace(cached)
    except OSError:
        pass  # bundled anew next time
    return script


def payload(report: Report, columns: Sequence[Column], rows: Sequence[tuple[RunRecord, list[Cell]]]) -> Any:
    """What the page's script works on."""
    return {
        "config": theme.CONFIG,
        "light": theme.LIGHT,
        "sections": [
            {
                "datasets": _columnar(section.data),
                "settings": [{"key": k, "values": v} for k, v in section.group.settings.items()],
                "figures": [asdict(figure) for figure in section.figures],
            }
            for section in report.sections
        ],
        "columns": [column.title for column in columns],
        "values": {run.id: [cell.value for cell in cells] for run, cells in rows},
        "samples": samples(report),
        "csv": csv_text(report),
        "method": next((i for i, column in enumerate(columns) if column.help == METHOD), -1),
        "name": re.sub(r"[^\w.=,-]+", "_", report.title) or "mopo",
    }


def _columnar(data: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[Any]]]:
    """Rows as columns: a third of the size."""
    keys = {name: dict.fromkeys(key for row in rows for key in row) for name, rows in data.items()}
    return {name: {key: [row.get(key) for row in rows] for key in keys[name]} for name, rows in data.items()}


# --------------------------------------------------------------------------------------------- tables
def table(report: Report) -> tuple[list[Column], list[tuple[RunRecord, list[Cell]]]]:
    """A row a run: state, settings that vary, win rates, thresholds kept, KL, front."""
    settings = list(varying_settings(report.runs))[:COLUMNS]
    names = list(dict.fromkeys(name for run in report.runs for name in run.names))
    exact = any(result.exact is not None for run in report.runs for result in run.objectives.values())
    front = {k: v for s in report.sections if s.quality for k, v in s.quality.front.items()}
    columns = [Column("run", False), Column("state", False)]
    swept = report.kind == "sweep"
    varied = [Column(groups.short(key), _numeric(report.runs, key), key) for key in settings]
    columns += varied if swept else []
    for name in names:
        columns.append(Column(name, help=f"win rate of {name} on samples, with half its 95 % interval"))
        columns += [Column(f"{name}, exact", help=f"exact win rate of {name}")] if exact else []
    columns += [Column("thresholds", False, "whether every threshold is kept, at 95 %"), Column("KL", help="nats")]
    columns += [Column("front", False, "no other run is at least as good in all objectives and better in one")]
    columns += [Column("warnings"), *([] if swept else varied)]
    rows = []
    for run in report.runs:
        cells = [Cell(run.id, run.id), Cell(run.state if run.finished else f"unfinished: {run.state}", run.state)]
        values = [Cell(value_of(run, key), _sortable(value_of(run, key))) for key in settings]
        cells += values if swept else []
        for name in names:
            cells += _rates(run, name, exact)
        cells.append(_verdict(run.verdict))
        cells.append(_number(run.summary.get("kl"), 3))
        cells.append(Cell("●" if front[run.id] else "", int(front[run.id])) if run.id in front else Cell())
        count = sum(not text.startswith("note") for text in run.warnings)
        cells.append(Cell(str(count), count) if run.finished else Cell())
        rows.append((run, cells if swept else cells + values))
    return columns, rows


def _numeric(runs: Sequence[RunRecord], key: str) -> bool:
    return all(isinstance(_sortable(value_of(run, key)), float) for run in runs if value_of(run, key))


def _sortable(text: str) -> float | str:
    try:
        value = float(text)
    except ValueError:
        return text
    return value if abs(value) < 1e308 else text


def _number(value: float | None, digits: int) -> Cell:
    return Cell() if value is None else Cell(f"{value:.{digits}f}", float(f"{value:.6g}"))


def _rates(run: RunRecord, name: str, exact: bool) -> list[Cell]:
    result = run.objectives.get(name)
    if result is None or result.win_rate is None:
        return [Cell()] * (1 + exact)
    half = f" ± {(result.ci95[1] - result.ci95[0]) / 2:.3f}" if result.ci95 else ""
    mark = result.verdict if result.verdict in ("yes", "no") else ""
    sampled = Cell(f"{result.win_rate:.3f}{half}", float(f"{result.win_rate:.6g}"), "" if exact else mark)
    return [sampled, replace(_number(result.exact, 3), mark=mark)] if exact else [sampled]


def _verdict(verdict: str) -> Cell:
    order = {"no": 0, "undecided": 1, "yes": 2}
    return Cell(WORDS[verdict], order[verdict], verdict if verdict != "undecided" else "") if verdict else Cell()


def objective_table(run: RunRecord) -> list[tuple[Column, list[Cell]]]:
    """The final table of one run, a row an objective: its columns that say something."""
    accuracy = run.summary.get("heldout_accuracy") or {}
    results, none = list(run.objectives.values()), bool(run.out_of_reach)
    shares = [accuracy.get(name) for name in run.objectives]
    columns = [
        (Column("objective", False), [Cell(name) for name in run.objectives]),
        (Column("role", False), [Cell(r.role) for r in results]),
        (Column("threshold"), [_threshold(r) for r in results]),
        (Column("win rate"), [_rates(run, name, False)[0] for name in run.objectives]),
        (Column("estimated"), [_number(r.estimated, 3) for r in results]),
        (Column("exact"), [_number(r.exact, 3) for r in results]),
        (Column("optimum"), [_number(r.optimum if groups.aimed(run) else None, 3) for r in results]),
        (Column("attainable"), [_number(r.attainable if none else None, 3) for r in results]),
        (Column("threshold kept", False), [_verdict(r.verdict) for r in results]),
        (Column("λ"), [_number(r.dual, 3) for r in results]),
        (Column("held-out accuracy"), [Cell("" if share is None else f"{share:.1%}") for share in shares]),
        (Column("judged by", False), [Cell(r.judge or "") for r in results]),
    ]
    return [(column, cells) for column, cells in columns if any(cell.text for cell in cells)]


def _threshold(result: Result) -> Cell:
    cell = _number(result.threshold, 3)
    return cell if result.asked or not cell.text else replace(cell, text=cell.text + OWN_MARK)


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """What else is worth knowing of one run, as a heading and a text each."""
    summary = run.summary
    train, oracle = summary.get("train") or {}, run.oracle
    constrained = any(result.threshold is not None for result in run.objectives.values())
    own = any(result.threshold is not None and not result.asked for result in run.objectives.values())
    exact = f", exact {oracle['kl']:.3f}" if oracle.get("kl") is not None else ""
    asked = summary.get("evaluation") or {}
    steps = train.get("steps") or next((line["step"] for line in reversed(run.history)), None)
    rows: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("state", run.state, str),
        ("method", run.method or None, str),
        ("asked behind", summary.get("condition") or None, str),
        (
            "measured on",
            asked if "independent_prompts" in asked else None,
            lambda a: prompts_told(a["prompts"], a["independent_prompts"]),
        ),
        ("exact numbers are of", oracle.get("support_mass"), "{:.1%} of what the policy says".format),
        ("KL to the reference", summary.get("kl"), lambda kl: f"{kl:.3f} nats{exact}"),
        ("thresholds", OWN_NOTE if own and run.finished else None, str),
        ("optimum", run.out_of_reach or None, "none: {}".format),
        ("below the optimum", oracle.get("gap") if constrained else None, "{:.3f} of the primary's win rate".format),
        ("steps", steps or None, str),
        ("samples drawn in training", train.get("samples") or None, "{:,}".format),
        ("time", train.get("wall_seconds") or None, _duration),
        ("speed", train.get("pairs_per_second") or None, "{:,.0f} pairs/s".format),
        ("peak memory", train.get("peak_memory_mb") or None, "{:,.0f} MB".format),
        ("seed", summary.get("seed"), str),
    ]
    return [(head, text(value)) for head, value, text in rows if value is not None]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def numbers(quality: Quality) -> list[tuple[str, str, str]]:
    """Heading, number and what it means, of the set of runs."""
    values = set(quality.reference.values())
    named = ", ".join(f"{name} {value:g}" for name, value in quality.reference.items())
    origin = f"{values.pop():g} in every objective" if len(values) == 1 else named
    count = sum(quality.front.values())
    sampled = "of sampled win rates, 95 % interval by bootstrap over prompts"
    rows = [("non-dominated", f"{count} of {len(quality.front)}", "no other run is as good in all objectives")]
    exact = "" if quality.exact_hypervolume is None else f"; of exact ones {quality.exact_hypervolume:.4f}"
    text = f"{sampled}{exact}; reference point {origin}"
    low, high = quality.hypervolume.ci95 or (-1.0, 2.0)
    if not low <= quality.hypervolume.value <= high:
        text += ". The best of so many noisy runs look better than they are: the interval allows for that"
    rows.append(("hypervolume", _measured(quality.hypervolume), text))
    if quality.igd_plus is not None:
        exact = "" if quality.exact_igd_plus is None else f"; of exact ones {quality.exact_igd_plus:.4f}"
        text = f"distance to the exact front, whatever the KL, {sampled}{exact}"
        rows.append(("IGD+", _measured(quality.igd_plus), text))
    return rows


def _measured(number: Any) -> str:
    interval = f" [{number.ci95[0]:.4f}, {number.ci95[1]:.4f}]" if number.ci95 else ""
    return f"{number.value:.4f}{interval}"


def csv_text(report: Report) -> str:
    """Every number of every run, a row each."""
    quality = [s.quality for s in report.sections if s.quality]
    front = {k: v for q in quality for k, v in q.front.items()}
    distance = {k: v for q in quality for k, v in q.distance.items()}
    settings = varying_settings(report.runs)
    rows = []
    for run in report.runs:
        row: dict[str, Any] = {"run": run.id, "directory": str(run.path), "state": run.state}
        row |= {key: value_of(run, key) for key in settings}
        for name, r in run.objectives.items():
            low, high = r.ci95 or (None, None)
            row |= {f"win_rate/{name}": r.win_rate, f"ci95_low/{name}": low, f"ci95_high/{name}": high}
            row |= {f"exact/{name}": r.exact, f"optimum/{name}": r.optimum, f"estimated/{name}": r.estimated}
            row |= {f"attainable/{name}": r.attainable} if run.out_of_reach else {}
            row |= {f"threshold/{name}": r.threshold, f"satisfied/{name}": r.satisfied, f"dual/{name}": r.dual}
            row |= {f"verdict/{name}": r.verdict}
        row |= {"kl": run.summary.get("kl"), "gap": run.oracle.get("gap")}
        row |= {"nondominated": front.get(run.id), "igd_plus": distance.get(run.id)}
        row |= {"seconds": (run.summary.get("train") or {}).get("wall_seconds"), "warnings": len(run.warnings)}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --------------------------------------------------------------------------------------------- samples, settings
def samples(report: Report) -> dict[str, Any]:
    """Responses of every run to the prompts that most runs have in common, within the page's budget.

    A run that was asked none of them shows a few of its own.
    """
    with_answers = [run for run in report.runs if run.answers]
    if not with_answers:
        return {"prompts": [], "runs": {}}
    prompts_of = {run.id: dict.fromkeys(answer.prompt for answer in run.answers) for run in with_answers}
    counts = Counter(prompt for prompts in prompts_of.values() for prompt in prompts)
    chosen = [prompt for prompt, _ in counts.most_common(report.prompts)]
    for prompts in prompts_of.values():
        if not any(prompt in prompts for prompt in chosen):
            chosen += list(prompts)[: min(3, report.prompts)]
    each = max(1, min(4, 60 // len(with_answers)))  # responses a prompt
    budget = SAMPLE_BUDGET // len(with_answers)
    runs: dict[str, Any] = {}
    for run in with_answers:
        left, answers = budget, {}
        for number, prompt in enumerate(chosen):
            for answer in [a for a in run.answers if a.prompt == prompt][:each]:
                text = _cut(answer.response)
                left -= len(text) + 40
                if left < 0:
                    break
                answers.setdefault(number, []).append([text, [answer.scores.get(name) for name in run.names]])
        runs[run.id] = {"names": run.names, "answers": answers}
    return {"prompts": [_cut(prompt) for prompt in chosen], "runs": runs}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} characters more in the file)"


def config_text(report: Report, common: Mapping[str, Any]) -> str:
    """config.yaml of one run as it is; of several, what their configs have in common."""
    import yaml

    if len(report.runs) == 1:
        try:
            return masked((report.runs[0].path / "config.yaml").read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return ""
    nested: dict[str, Any] = {}
    for key, value in common.items():
        *parents, last = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump(nested, Dumper=dumper, sort_keys=False, allow_unicode=True) if nested else ""


def common_settings(runs: Sequence[RunRecord]) -> dict[str, Any]:
    first, *others = [run.settings for run in runs if run.settings] or [{}]
    return {k: v for k, v in first.items() if all(k in other and other[k] == v for other in others)}


def own_settings(run: RunRecord, common: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a run's config has besides what all runs have in common."""
    return [(key, shown(value)) for key, value in run.settings.items() if key not in common]


def command_of(run: RunRecord) -> str:
    """The command that makes this run again: the one it was made by; of a sweep, for this point alone."""
    text = masked(str(run.summary.get("command") or ""))
    try:
        words = shlex.split(text)
    except ValueError:
        return text
    if len(words) < 2 or words[1] != "sweep":
        return text
    shared = [w for w in words[2:] if w not in ("-m", "--multirun") and _key(w) not in run.varying
            and not _key(w).startswith("sweep.")]  # fmt: skip
    point = [f"{key}={value}" for key, value in run.varying.items() if value]
    return masked_command(["mopo", "sweep", *shared, *point])


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]
