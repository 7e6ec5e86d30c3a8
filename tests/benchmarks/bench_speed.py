"""`make bench`: a training step beside the peer's (TRL's DPOTrainer) and beside the machine's matrix-product rate.

Every measurement runs in a process of its own, on inputs made here: a random OPT, a word tokenizer, and pairs whose
lengths are spread like those of human dialogues. The peer has a virtual environment of its own under outputs/bench/;
where that cannot be made it is left out, with the reason.
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
from statistics import mean, median
from typing import Any

import numpy as np
import torch

ROOT = Path("outputs/bench")
PEER = "trl==1.16.0"
BATCH = 8  # pairs a step, as the peer's
CONTEXT = 512
WARM = 2  # steps before the clock starts


def opt(layers: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "vocab_size": vocabulary, "hidden_size": hidden, "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "word_embed_proj_dim": hidden,
        "max_position_embeddings": 2048, "dropout": 0.0,
    }  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A model's shape: its architecture, or the name of the option of conf/model/ that has it."""

    name: str
    architecture: dict[str, Any] | str
    batches: int  # of which the data consist: everyone goes through the same
    targets: dict[str, float]
    rounds: int = 1  # ours and the peer's in turn
    settings: dict[str, Any] = field(default_factory=dict)


LARGE = {"dpo": 5.5, "mopo": 4.0, "flops": 0.85, "memory": 0.42}
SIZES = (
    Size("hidden 256", opt(4, 256, 8000), 16, {"dpo": 10.0, "mopo": 7.0, "flops": 0.70, "memory": 0.40}, 2),
    Size("hidden 768", opt(8, 768, 16000), 6, LARGE),
    Size("OPT-125M", opt(12, 768, 50272), 5, LARGE),
)
GPU = {"dpo": 2.0, "mopo": 1.5, "flops": 0.5, "memory": 1.0}
GPU_SIZES = (
    Size("OPT-1.3B, bf16", "opt1.3b", 20, GPU, 2, {"mixed_precision": "bf16"}),
    Size("Llama-3.1-8B, LoRA", "llama3.1-8b", 10, GPU, 1, {"dtype": "bfloat16", "lora_r": 16}),
)
SAVINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("nothing", {}),
    ("token_budget=512", {"budget": 512}),
    ("gradient_accumulation=2, of 4 pairs each", {"accumulation": 2}),
    ("model.gradient_checkpointing=true", {"model": {"gradient_checkpointing": True}}),
    ("model.mixed_precision=bf16", {"model": {"mixed_precision": "bf16"}}),
    ("model.dtype=bfloat16", {"model": {"dtype": "bfloat16"}}),
    ("model.compile=true", {"model": {"compile": True}}),
    ("optimiser.fused=false", {"fused": False}),
    ("model.lora.r=16", {"model": {"lora_r": 16}}),
    ("a padded sequence a response", {"layout": "plain"}),
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


SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
QUANTILES = (  # tokens of prompt, chosen and rejected, of 2 307 human dialogues about harmlessness
    (4, 16, 33, 98, 172, 276, 354, 541, 851),
    (2, 6, 15, 28, 54, 89, 121, 199, 279),
    (2, 6, 18, 37, 68, 115, 152, 261, 585),
)


def lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 3) token counts with the quantiles above, paired by chance; a prompt is cut so that its pair fits."""
    even = (np.arange(count) + 0.5) / count
    columns = [rng.permutation(np.interp(even, SHARES, values)).round().astype(int) for values in QUANTILES]
    rows = np.minimum(np.stack(columns, axis=1), CONTEXT // 2)
    rows[:, 0] = np.minimum(np.round(np.interp(even, SHARES, QUANTILES[0])), CONTEXT - 2 - rows[:, 1:].max(axis=1))
    return rng.permutation(rows)


def architecture_of(size: Size) -> dict[str, Any]:
    if isinstance(size.architecture, dict):
        return size.architecture
    from omegaconf import OmegaConf

    from mopo_cli.config import compose

    node = compose.compose("train", [f"model={size.architecture}"]).model.architecture
    return OmegaConf.to_container(node)  # type: ignore[return-value]


def make_inputs(size: Size) -> Path:
    """outputs/bench/inputs/SIZE: model/ in the hub's layout, with a tokenizer, and pairs.jsonl in TRL's format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    target = ROOT / "inputs" / size.name.replace(" ", "-").replace(",", "")
    if (target / "pairs.jsonl").exists():
        return target
    architecture = dict(architecture_of(size))
    vocabulary = architecture["vocab_size"]
    words = ["<pad>", "</s>", *(f"w{i}" for i in range(2, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="</s>")
    fast.save_pretrained(target / "model")
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = AutoConfig.for_model(architecture.pop("model_type"), **{**architecture, **special})
    dtype = getattr(torch, size.settings.get("dtype", "float32"))
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(target / "model")
    rng = np.random.default_rng(0)
    with open(target / "pairs.jsonl", "w", encoding="utf-8") as file:
        for sizes in lengths(rng, size.batches * BATCH).tolist():
            prompt, chosen, rejected = (" ".join(f"w{i}" for i in rng.integers(2, vocabulary, n)) for n in sizes)
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
    from mopo_cli.data.table import TokenRow

    rng = np.random.default_rng(0)

    def tokens(n: int) -> list[int]:
        return rng.integers(2, vocabulary, n).tolist()

    return [TokenRow(tokens(prompt), [tokens(response) for _ in range(responses)]) for _ in range(count)]


def useful_flops(rows: Sequence[Any], shape: dict[str, Any], passes: int) -> float:
    """Multiplications and additions that these rows need, prompts once and the head on response tokens only.

    passes: 3 for forward and backward, 1 for forward alone. shape: a model's config.
    """
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    grouped = hidden * (shape.get("num_key_value_heads") or shape["num_attention_heads"]) / shape["num_attention_heads"]
    gated = 3 * shape["intermediate_size"] if "intermediate_size" in shape else 2 * shape["ffn_dim"]
    body = layers * hidden * (2 * hidden + 2 * grouped + gated)
    total = 0.0
    for row in rows:
        p, answers = len(row.prompt), [len(r) for r in row.responses]
        looks = p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in answers)
        total += 2 * ((p + sum(answers)) * body + sum(answers) * hidden * shape["vocab_size"])
        total += 4 * layers * hidden * looks
    return passes * total


def load_inputs(spec: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """The model's config, the model, and the token rows that a measurement runs on."""
    from mopo_cli.config.schema import ModelConfig
    from mopo_cli.data.encoder import Encoder
    from mopo_cli.models.load import load_policy
    from mopo_cli.models.tokenizers import load_tokenizer

    inputs = Path(spec["inputs"])
    settings = {"path": str(inputs / "model"), "max_length": CONTEXT, **spec.get("model", {})}
    lora = settings.pop("lora_r", 0)
    config = ModelConfig(**settings)
    config.lora.r = lora
    tokenizer = load_tokenizer(config, [])
    if "rows" in spec:
        rows = random_rows(**spec["rows"])
    else:
        encoder = Encoder(tokenizer, CONTEXT)
        pairs = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()]
        rows = [encoder.row(p["prompt"], [p["chosen"], p["rejected"]]) for p in pairs]
    return config, load_policy(config, tokenizer, 0), rows


def measure(spec: dict[str, Any]) -> dict[str, float]:
    """Pairs and tokens a second, share of the matrix-product rate, and peak memory, of one method on one input."""
    from accelerate import Accelerator

    from mopo_cli.algorithms.mopo.core import Lagrangian, LogpBatch, MopoSettings
    from mopo_cli.config.schema import OptimiserConfig
    from mopo_cli.data.batches import Collator, batch_rows
    from mopo_cli.data.table import row_length
    from mopo_cli.models.attention import attend_by_rows
    from mopo_cli.models.logprobs import response_logps
    from mopo_cli.models.parts import unwrap
    from mopo_cli.models.policy import Policy
    from mopo_cli.training.loop import Progressed, Task, Trainer

    accelerator = Accelerator()
    device = accelerator.device
    config, model, rows = load_inputs(spec)
    shape = unwrap(model).config.to_dict()  # type: ignore[operator, union-attr]
    low = device.type == "cuda"
    packed = spec.get("layout") != "plain"
    apart = device.type == "cpu" and packed and not config.compile and attend_by_rows(model)
    collate = Collator(0, packed, apart, spec.get("budget"))
    turns = spec.get("objectives", [2])  # how many objectives each step has, in turn, on the same rows
    steps, count = (spec["steps"] + WARM) * len(turns), spec.get("batch", BATCH)
    fused = spec.get("fused", True)
    trainer = Trainer(
        accelerator, model, OptimiserConfig(1e-6, fused=fused), steps, spec.get("accumulation", 1), spec.get("budget")
    )
    policy = Policy(model, None, collate)  # type: ignore[arg-type]  # no texts here
    reference = policy.snapshot()

    def rows_of(step: int) -> list[int]:
        return batch_rows(len(rows), count, 0, step // len(turns))

    cached: dict[int, torch.Tensor] = {}
    if spec["method"] == "dpo":  # references precomputed, as the peer's
        used = sorted({i for step in range(steps) for i in rows_of(step)})
        values = policy.logps_under(reference, [rows[i] for i in used])
        cached = dict(zip(used, values, strict=True))
        reference = {}  # no more needed
    methods = {
        k: Lagrangian(MopoSettings(tuple(map(str, range(k))), (0.5,) * (k - 1), 0.08, 1.0, "auto", float("inf")))
        for k in turns
    }
    now = turns[0]

    def loss_of(numbers: list[int]) -> torch.Tensor:
        taken = [rows[i] for i in numbers]
        logps = response_logps(model, collate(taken).to(device))
        before = [cached[i] for i in numbers] if cached else policy.logps_under(reference, taken)
        ref = torch.stack(before).to(device)
        if spec["method"] == "dpo":
            return -torch.nn.functional.logsigmoid(0.1 * ((logps - ref)[:, 0] - (logps - ref)[:, 1])).sum()
        everywhere = torch.ones_like(ref, dtype=torch.bool)
        even = torch.full((*ref.shape, now), 0.5, device=device)
        return methods[now].loss(LogpBatch(logps, ref, ref, even, everywhere, everywhere)).sum()

    rates: list[float] = []
    flops, pairs, tokens, started = 0.0, 0, 0, 0.0
    seconds = dict.fromkeys(turns, 0.0)
    passes = 3 if cached else 4  # the lagged reference is one more pass forward

    def before_step(step: int) -> None:
        nonlocal started, now
        now = turns[step % len(turns)]
        if step >= WARM * len(turns) and step % 4 == 0:
            rates.append(matrix_rate(torch.bfloat16 if low else torch.float32, device.type))  # its speed drifts
        _finish(device.type)
        started = time.perf_counter()

    def after_step(progressed: Progressed) -> None:
        nonlocal flops, pairs, tokens
        _finish(device.type)
        if progressed.step <= WARM * len(turns):
            return
        seconds[now] += time.perf_counter() - started
        taken = [rows[i] for i in rows_of(progressed.step - 1)]
        flops += useful_flops(taken, shape, passes)
        pairs += len(taken)
        tokens += sum(map(row_length, taken))

    trainer.fit(Task(rows_of, loss_of, length_of=lambda i: row_length(rows[i])), before_step, after_step)
    total = sum(seconds.values())
    return {
        "pairs_per_s": pairs / total,
        "tokens_per_s": tokens / total,
        "flops_share": flops / total / median(rates),
        "peak_memory_mb": _peak(device.type),
        "matrix_gflops": median(rates) / 1e9,
        **{f"pairs_per_s/{k}": pairs / len(turns) / took for k, took in seconds.items()},
    }


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")  # getrusage's peak is at least that of the process that started this one
    if status.exists():
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
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
folder, steps, batch, longest, lora = sys.argv[1], *map(int, sys.argv[2:6])
import torch
gpu = torch.cuda.is_available()
model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype="auto")
peft = None
if lora:
    from peft import LoraConfig
    peft = LoraConfig(r=lora, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
data = load_dataset("json", data_files=f"{folder}/pairs.jsonl", split="train")
ends = []
class Clock(TrainerCallback):
    def on_step_end(self, *args, **settings):
        ends.append(time.perf_counter())
config = DPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, max_steps=steps + 2,
                   max_length=longest, learning_rate=1e-6, logging_steps=1000, save_strategy="no", report_to=[],
                   bf16=gpu, gradient_checkpointing=False, use_cpu=not gpu, disable_tqdm=True,
                   precompute_ref_log_probs=True)
DPOTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()],
           peft_config=peft).train()
def resident():
    if not os.path.exists("/proc/self/status"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
peak = torch.cuda.max_memory_allocated() / 2**20 if gpu else resident()
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


def peer(python: str, inputs: Path, size: Size) -> dict[str, float]:
    arguments = [str(inputs), *map(str, (size.batches, BATCH, CONTEXT, size.settings.get("lora_r", 0)))]
    done = subprocess.run([python, "-c", PEER_SCRIPT, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the peer failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------- tables


def compare(size: Size, python: str | None) -> list[Record]:
    """Our DPO and MOPO, and the peer, on one size; in rounds, since the machine's speed drifts."""
    inputs = make_inputs(size)
    runs: dict[str, list[dict[str, float]]] = {"dpo": [], "mopo": [], "trl": []}
    for _ in range(size.rounds):
        for name in ("dpo", "mopo"):
            spec = {"inputs": str(inputs), "method": name, "steps": size.batches * size.rounds, "model": size.settings}
            runs[name].append(apart(spec))
        if python:
            runs["trl"].append(peer(python, inputs, size))
    found = {name: {key: mean(r[key] for r in of) for key in of[0]} for name, of in runs.items() if of}
    theirs = found.get("trl")
    records = []
    for name in ("dpo", "mopo"):
        ours = found[name]
        numbers = {key: ours[key] for key in ("pairs_per_s", "tokens_per_s", "flops_share", "peak_memory_mb")}
        ratio = ours["pairs_per_s"] / theirs["pairs_per_s"] if theirs else None
        records.append(Record(size.name, name, **numbers, ratio_to_trl=ratio))
        show(size, records[-1], theirs, ours["matrix_gflops"])
    if theirs:
        records.append(Record(size.name, "trl", theirs["pairs_per_s"], None, None, theirs["peak_memory_mb"], 1.0))
        print(f"| {size.name} | TRL, references precomputed | {theirs['pairs_per_s']:.2f} | | | "
              f"{theirs['peak_memory_mb']:.0f} | |", flush=True)  # fmt: skip
    return records


def savings(size: Size) -> list[tuple[str, float, float]]:
    """(setting, pairs/s, megabytes) of our DPO."""
    inputs = make_inputs(size)
    print(f"\n| {size.name}, setting | pairs/s | MB |\n|---|---:|---:|")
    found = []
    for label, more in SAVINGS:
        try:
            n = apart({"inputs": str(inputs), "method": "dpo", "steps": size.batches, **more})
        except RuntimeError as error:
            print(f"| {label} | {error} | |", flush=True)
            continue
        found.append((label, n["pairs_per_s"], n["peak_memory_mb"]))
        print(f"| {label} | {n['pairs_per_s']:.2f} | {n['peak_memory_mb']:.0f} |", flush=True)
    return found


def show(size: Size, record: Record, theirs: dict[str, float] | None, rate: float) -> None:
    goal = size.targets
    ratio = f"{record.ratio_to_trl:.1f} (≥ {goal[record.method]:g})" if record.ratio_to_trl else "–"
    memory = f"{record.peak_memory_mb:.0f}"
    if theirs:
        memory += f", {record.peak_memory_mb / theirs['peak_memory_mb']:.0%} (≤ {goal['memory']:.0%})"
    share = f"{record.flops_share:.0%} of {rate:.0f} GFLOP/s (≥ {goal['flops']:.0%})"
    print(f"| {size.name} | our {record.method.upper()} | {record.pairs_per_s:.2f} | {record.tokens_per_s:.0f} | "
          f"{share} | {memory} | {ratio} |", flush=True)  # fmt: skip


def growth(inputs: Path) -> dict[str, list[tuple[str, float, float]]]:
    """How a step grows: (what, seconds a prompt relative to the first line, megabytes) of each table."""

    def of(label: str, shape: tuple[int, int, int], **more: Any) -> tuple[str, dict[str, float]]:
        prompt, response, responses = shape
        rows = {"count": 64, "vocabulary": 8000, "prompt": prompt, "response": response, "responses": responses}
        return label, apart({"inputs": str(inputs), "method": "dpo", "steps": 12, "rows": rows, **more})

    def turns(objectives: tuple[int, ...]) -> list[tuple[str, dict[str, float]]]:
        _, n = of("", (114, 46, 2), method="mopo", steps=24, objectives=objectives)
        return [(str(k), {**n, "pairs_per_s": n[f"pairs_per_s/{k}"]}) for k in objectives]

    tables: dict[str, Callable[[], list[tuple[str, dict[str, float]]]]] = {
        "response length, tokens (prompt 114)": lambda: [of(str(n), (114, n, 2)) for n in (25, 50, 100, 200)],
        "responses a prompt (114 + 46 tokens each)": lambda: [of(str(n), (114, 46, n)) for n in (2, 4, 8)],
        "objectives K, taking turns on the same rows": lambda: turns((1, 2, 4, 8)),
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

    from mopo_cli.config import compose, schema
    from mopo_cli.training.inputs import prepare_inputs

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
        composed = compose.typed(compose.compose("train", overrides), schema.TrainConfig)
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
    sizes = GPU_SIZES if torch.cuda.is_available() else SIZES
    print(f"{platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.__version__}, {BATCH} pairs a step\n")
    print("| size | method | pairs/s | tokens/s | useful FLOP/s | MB | times TRL |\n|---|---|---:|---:|---|---|---|")
    records = [record for size in sizes[: 1 if arguments.small else None] for record in compare(size, python)]
    ROOT.mkdir(parents=True, exist_ok=True)
    (ROOT / "bench.json").write_text(json.dumps([asdict(record) for record in records], indent=2) + "\n")
    if not arguments.small:
        tables = {"savings": savings(sizes[0]), "growth": growth(make_inputs(SIZES[0])), "data": data_growth()}
        (ROOT / "growth.json").write_text(json.dumps(tables, indent=2) + "\n")
    print(f"\n{ROOT / 'bench.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
