"""`make bench`: a training step beside the peer's (TRL's DPOTrainer) and beside the machine's matrix-product rate.

Every measurement runs in a process of its own, on inputs made here: a random OPT, a word tokenizer, and pairs whose
lengths are spread like those of 2 307 human dialogues about harmlessness (mean and standard deviation of prompt, chosen
and rejected), those beyond the context left out. The peer has a virtual environment of its own under outputs/bench/; where that cannot be made it is left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

ROOT = Path("outputs/bench")
PEER = "trl==1.16.0"
BATCH = 8  # pairs a step, as the peer's
CONTEXT = 512


@dataclass(frozen=True)
class Size:
    name: str
    layers: int
    hidden: int
    vocabulary: int
    steps: int  # timed
    peer_steps: int
    targets: dict[str, float] = field(default_factory=dict)


SIZES = (
    Size("hidden 256", 4, 256, 8000, 30, 12, {"dpo": 10.0, "mopo": 7.0, "flops": 0.70, "memory": 0.40}),
    Size("hidden 768", 8, 768, 16000, 8, 6, {"dpo": 5.5, "mopo": 4.0, "flops": 0.85, "memory": 0.42}),
    Size("OPT-125M", 12, 768, 50272, 5, 4, {"dpo": 5.5, "mopo": 4.0, "flops": 0.85, "memory": 0.42}),
)


@dataclass(frozen=True)
class Record:
    """One line of bench.json."""

    size: str
    method: str
    pairs_per_s: float
    tokens_per_s: float | None
    flops_share: float | None
    peak_memory_mb: float
    ratio_to_trl: float | None = None


# --------------------------------------------------------------------------------------------- inputs


def lengths(rng: np.random.Generator, mean: float, spread: float, count: int) -> np.ndarray:
    """Log-normal token counts with a mean and standard deviation, 2 at least."""
    variance = np.log(1.0 + (spread / mean) ** 2)
    drawn = rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), count)
    return np.maximum(drawn.round(), 2).astype(int)


def make_inputs(size: Size, count: int = 400) -> Path:
    """outputs/bench/inputs/SIZE: model/ in the hub's layout, with a tokenizer, and pairs.jsonl in TRL's format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    target = ROOT / "inputs" / size.name.replace(" ", "-")
    if (target / "pairs.jsonl").exists():
        return target
    words = ["<pad>", "</s>", *(f"w{i}" for i in range(2, size.vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="</s>")
    fast.save_pretrained(target / "model")
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, ffn_dim=4 * size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64, word_embed_proj_dim=size.hidden, max_position_embeddings=2048,
        pad_token_id=0, eos_token_id=1, bos_token_id=1, dropout=0.0,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(target / "model")
    rng = np.random.default_rng(0)
    drawn = np.stack([lengths(rng, 125.6, 115.3, 4 * count), lengths(rng, 40.9, 39.6, 4 * count),
                      lengths(rng, 52.5, 53.7, 4 * count)], axis=1)  # fmt: skip
    fits = drawn[:, 0] + drawn[:, 1:].max(axis=1) < CONTEXT  # neither side truncates
    shapes = drawn[fits][:count]
    with open(target / "pairs.jsonl", "w", encoding="utf-8") as file:
        for sizes in shapes.tolist():
            prompt, chosen, rejected = (" ".join(f"w{i}" for i in rng.integers(2, size.vocabulary, n)) for n in sizes)
            file.write(json.dumps({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}) + "\n")
    return target


# --------------------------------------------------------------------------------------------- one measurement


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the best of some matrix products of this machine."""
    best = 0.0
    for n, repeats in ((1024, 20), (2048, 6)):
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        for _ in range(2):
            torch.mm(a, b)
        _finish(device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        _finish(device)
        best = max(best, repeats * 2 * n**3 / (time.perf_counter() - started))
    return best


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def random_rows(count: int, vocabulary: int, prompt: int, response: int, responses: int) -> list[Any]:
    """Rows of one shape."""
    from mopo_cli.data.tokens import TokenRow

    rng = np.random.default_rng(0)

    def tokens(n: int) -> list[int]:
        return rng.integers(2, vocabulary, n).tolist()

    return [TokenRow(tokens(prompt), [tokens(response) for _ in range(responses)]) for _ in range(count)]


def useful_flops(rows: Sequence[Any], layers: int, hidden: int, vocabulary: int, passes: int) -> float:
    """Multiplications and additions that these rows need, prompts once and the head on response tokens only.

    passes: 3 for forward and backward, 1 for forward alone.
    """
    body = 12 * hidden**2 * layers
    total = 0.0
    for row in rows:
        p, answers = len(row.prompt), [len(r) for r in row.responses]
        looks = p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in answers)
        total += 2 * ((p + sum(answers)) * body + sum(answers) * hidden * vocabulary + 2 * layers * hidden * looks)
    return passes * total


def measure(spec: dict[str, Any]) -> dict[str, float]:
    """Pairs and tokens a second, share of the matrix-product rate, and peak memory, of one method on one input."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mopo_cli.algorithms.mopo import LogpBatch, Mopo
    from mopo_cli.data.tokens import Collator, Encoder, batch_rows, row_length
    from mopo_cli.models.attention import attend_by_rows
    from mopo_cli.models.logprobs import response_logps
    from mopo_cli.models.reference import reference_logps, snapshot

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = Path(spec["inputs"])
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=dtype)
    model.to(torch.device(device)).train()  # type: ignore[arg-type]
    if "rows" in spec:
        rows = random_rows(**spec["rows"])
    else:
        encoder = Encoder(AutoTokenizer.from_pretrained(inputs / "model"), CONTEXT)
        pairs = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()]
        rows = [encoder.row(p["prompt"], [p["chosen"], p["rejected"]]) for p in pairs]
    apart = device == "cpu" and spec.get("layout") != "plain" and attend_by_rows(model)
    collate = Collator(0, packed=spec.get("layout") != "plain", apart=apart)
    reference = snapshot(model)
    cached = reference_logps(model, reference, rows, collate) if spec["method"] == "dpo" else []
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    objectives = spec.get("objectives", 2)
    method = Mopo(tuple(map(str, range(objectives))), (0.5,) * (objectives - 1), 0.08, 1.0, "auto", float("inf"))

    def step(number: int) -> list[Any]:
        chosen = batch_rows(len(rows), spec.get("batch", BATCH), 0, number)
        taken = [rows[i] for i in chosen]
        batch = collate(taken).to(torch.device(device))
        logps = response_logps(model, batch)
        before = [cached[i] for i in chosen] if cached else reference_logps(model, reference, taken, collate)
        ref = torch.stack(before).to(device)
        if spec["method"] == "dpo":
            loss = -torch.nn.functional.logsigmoid(0.1 * ((logps - ref)[:, 0] - (logps - ref)[:, 1])).mean()
        else:
            everywhere = torch.ones_like(ref, dtype=torch.bool)
            rates = torch.full((*ref.shape, objectives), 0.5, device=device)
            loss = method.loss(LogpBatch(logps, ref, ref, rates, everywhere, everywhere)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return taken

    for number in range(2):
        step(number)
    _finish(device)
    rates, flops, pairs, tokens, seconds = [], 0.0, 0, 0, 0.0
    passes = 3 if cached else 4  # the lagged reference is one more pass forward
    config = model.config
    for number in range(2, 2 + spec["steps"]):
        if number % 4 == 2:
            rates.append(matrix_rate(dtype, device))  # beside the steps: the machine's speed drifts
        started = time.perf_counter()
        taken = step(number)
        _finish(device)
        seconds += time.perf_counter() - started
        flops += useful_flops(taken, config.num_hidden_layers, config.hidden_size, config.vocab_size, passes)
        pairs += len(taken)
        tokens += sum(map(row_length, taken))
    return {
        "pairs_per_s": pairs / seconds,
        "tokens_per_s": tokens / seconds,
        "flops_share": flops / seconds / median(rates),
        "peak_memory_mb": _peak(device),
        "matrix_gflops": median(rates) / 1e9,
    }


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(spec: dict[str, Any]) -> dict[str, float]:
    """`measure` in a process of its own, whose memory is its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(spec)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------- the peer

PEER_SCRIPT = """
import json, os, resource, sys, tempfile, time
os.environ["HF_HUB_OFFLINE"] = "1"
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer
folder, steps, batch, longest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
data = load_dataset("json", data_files=f"{folder}/pairs.jsonl", split="train").select(range((steps + 5) * batch))
ends = []
class Clock(TrainerCallback):
    def on_step_end(self, *args, **settings):
        ends.append(time.perf_counter())
config = DPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, max_steps=steps + 2,
                   max_length=longest, learning_rate=1e-6, logging_steps=1000, save_strategy="no", report_to=[],
                   bf16=False, gradient_checkpointing=False, use_cpu=True, disable_tqdm=True,
                   precompute_ref_log_probs=True)
DPOTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]).train()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"pairs_per_s": (len(ends) - 2) * batch / (ends[-1] - ends[1]), "peak_memory_mb": peak}))
"""


def peer_python() -> str:
    """The peer's interpreter, its environment made where it is not there; RuntimeError where that fails."""
    if found := os.environ.get("TRL_PYTHON"):
        return found
    folder = ROOT / "trl-env"
    python = folder / "bin" / "python"
    if not (folder / ".done").exists():
        print(f"installing {PEER} into {folder}", flush=True)
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", f"torch=={torch.__version__.partition('+')[0]}", PEER,
             "transformers", "datasets"],
        ):  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{PEER} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        (folder / ".done").touch()
    return str(python)


def peer(python: str, inputs: Path, steps: int) -> dict[str, float]:
    arguments = [str(inputs), str(steps), str(BATCH), str(CONTEXT)]
    done = subprocess.run([python, "-c", PEER_SCRIPT, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the peer failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------- tables


def compare(size: Size, python: str | None) -> list[Record]:
    """Our DPO and MOPO, and the peer, on one size."""
    inputs = make_inputs(size)
    theirs = peer(python, inputs, size.peer_steps) if python else None
    records = []
    for name in ("dpo", "mopo"):
        ours = apart({"inputs": str(inputs), "method": name, "steps": size.steps})
        ratio = ours["pairs_per_s"] / theirs["pairs_per_s"] if theirs else None
        numbers = {key: ours[key] for key in ("pairs_per_s", "tokens_per_s", "flops_share", "peak_memory_mb")}
        records.append(Record(size.name, name, **numbers, ratio_to_trl=ratio))
        show(size, records[-1], theirs, ours["matrix_gflops"])
    if theirs:
        records.append(Record(size.name, "trl", theirs["pairs_per_s"], None, None, theirs["peak_memory_mb"], 1.0))
        print(f"| {size.name} | TRL, references precomputed | {theirs['pairs_per_s']:.2f} | | | "
              f"{theirs['peak_memory_mb']:.0f} | |", flush=True)  # fmt: skip
    return records


def show(size: Size, record: Record, theirs: dict[str, float] | None, rate: float) -> None:
    goal = size.targets
    ratio = f"{record.ratio_to_trl:.1f} (≥ {goal[record.method]:g})" if record.ratio_to_trl else "–"
    memory = f"{record.peak_memory_mb:.0f}"
    if theirs:
        memory += f", {record.peak_memory_mb / theirs['peak_memory_mb']:.0%} (≤ {goal['memory']:.0%})"
    share = f"{record.flops_share:.0%} of {rate:.0f} GFLOP/s (≥ {goal['flops']:.0%})"
    print(f"| {size.name} | our {record.method.upper()} | {record.pairs_per_s:.2f} | {record.tokens_per_s:.0f} | "
          f"{share} | {memory} | {ratio} |", flush=True)  # fmt: skip


def growth(inputs: Path, vocabulary: int) -> dict[str, list[tuple[str, float, float]]]:
    """How a step grows: (what, seconds a prompt relative to the first line, megabytes) of each table."""

    def of(label: str, shape: tuple[int, int, int], **more: Any) -> tuple[str, dict[str, float]]:
        prompt, response, responses = shape
        rows = {"count": 64, "vocabulary": vocabulary, "prompt": prompt, "response": response, "responses": responses}
        return label, apart({"inputs": str(inputs), "method": "dpo", "steps": 12, "rows": rows, **more})

    tables: dict[str, Callable[[], list[tuple[str, dict[str, float]]]]] = {
        "response length, tokens (prompt 114)": lambda: [of(str(n), (114, n, 2)) for n in (25, 50, 100, 200)],
        "responses a prompt (114 + 46 tokens each)": lambda: [of(str(n), (114, 46, n)) for n in (2, 4, 8)],
        "objectives K": lambda: [of(str(k), (114, 46, 2), method="mopo", objectives=k) for k in (1, 2, 4, 8)],
        "a prompt ten times its responses (300 + 30 + 30)": lambda: [
            of("each response behind a prompt of its own", (300, 30, 2), layout="plain"),
            of("the prompt once", (300, 30, 2)),
        ],
    }
    found = {}
    for title, run in tables.items():
        lines = run()
        first = lines[0][1]["pairs_per_s"]
        found[title] = [(label, first / n["pairs_per_s"], n["peak_memory_mb"]) for label, n in lines]
        print(f"\n| {title} | time | MB |\n|---|---:|---:|")
        for label, times, memory in found[title]:
            print(f"| {label} | {times:.2f} x | {memory:.0f} |", flush=True)
    return found


def data_growth() -> list[tuple[int, float, float]]:
    """(rows, seconds, megabytes) of reading, checking and encoding a file of pairs."""
    print("\n| rows read, checked and encoded | seconds | rows/s | MB |\n|---|---:|---:|---:|")
    found = []
    for rows in (1_000, 10_000, 100_000):
        done = subprocess.run(
            [sys.executable, __file__, "--data", str(rows)], capture_output=True, text=True, check=True
        )
        seconds, memory = json.loads(done.stdout.splitlines()[-1])
        found.append((rows, seconds, memory))
        print(f"| {rows} | {seconds:.1f} | {rows / seconds:.0f} | {memory:.0f} |", flush=True)
    return found


def prepare_data(rows: int) -> tuple[float, float]:
    import tempfile

    from mopo_cli import config
    from mopo_cli.inputs import prepare_inputs

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for number in range(rows):
                texts = [" ".join(f"w{i}" for i in rng.integers(0, 3000, n)) for n in (60, 20, 25)]
                file.write(
                    json.dumps({"prompt": f"{number} {texts[0]}", "chosen": texts[1], "rejected": texts[2]}) + "\n"
                )
        overrides = ["dataset=pairs", f"dataset.path={path}", "dataset.chosen_means=human", "objectives=human_concise"]
        overrides.append("cache=null")  # encoded anew
        composed = config.typed(config.compose("train", overrides), config.TrainConfig)
        started = time.perf_counter()
        prepare_inputs(composed)
        return time.perf_counter() - started, _peak("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="hidden 256 alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
        return 0
    if arguments.data:
        print(json.dumps(prepare_data(arguments.data)))
        return 0
    try:
        python = peer_python()
    except RuntimeError as error:
        python = None
        print(f"without the peer: {error}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.__version__}, {BATCH} pairs a step\n")
    print("| size | method | pairs/s | tokens/s | useful FLOP/s | MB | times TRL |\n|---|---|---:|---:|---|---|---|")
    records = [record for size in SIZES[: 1 if arguments.small else None] for record in compare(size, python)]
    ROOT.mkdir(parents=True, exist_ok=True)
    (ROOT / "bench.json").write_text(json.dumps([asdict(record) for record in records], indent=2) + "\n")
    if not arguments.small:
        tables = {"growth": growth(make_inputs(SIZES[0]), SIZES[0].vocabulary), "data": data_growth()}
        (ROOT / "growth.json").write_text(json.dumps(tables, indent=2) + "\n")
    print(f"\n{ROOT / 'bench.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
