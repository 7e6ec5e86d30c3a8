"""A policy: a causal language model with what it takes to ask it. Weights are read, copied and written in this file.

The reference policy is a snapshot of the trainable parameters, swapped in to compute log-probs. No second model is
held: with LoRA a snapshot is the adapter, with full fine-tuning one copy of the weights on the CPU.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mopo_cli.base.errors import NotFiniteError
from mopo_cli.base.files import whole
from mopo_cli.config.schema import ModelConfig, SamplingConfig
from mopo_cli.data.batches import Collator
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.table import TokenRow, TokenTable
from mopo_cli.models import sampling
from mopo_cli.models.attention import attend_by_rows
from mopo_cli.models.hub import check_adapter, check_weights
from mopo_cli.models.load import ends_of, load_policy
from mopo_cli.models.logprobs import all_finite, all_logps, collator_of
from mopo_cli.models.parts import ADAPTER, check_complete, check_weights_finite, inner, lora_of, not_finite

ADAPTER_FILE = "adapter_model.safetensors"
LONG = 128  # tokens of a row, on average, from which attention to each apart beats padding; not on a GPU
LOOKED_AT = 8  # rows that show whether a model gives numbers at all
UNTOLD = ("architectures", "transformers_version", "use_cache", "dtype", "torch_dtype", "attn_implementation")

Snapshot = dict[str, Tensor]


@dataclass
class Policy:
    """The model, its encoder (texts to token ids) and its collator (rows to batches in the layout that it takes)."""

    model: nn.Module
    encoder: Encoder
    collate: Collator

    @classmethod
    def load(
        cls, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int, token_budget: int | None = None
    ) -> Policy:
        """The model that a config names, its random parts drawn from `seed`; UserError where it cannot be had."""
        model = load_policy(config, tokenizer, seed)
        encoder = Encoder(tokenizer, config.max_length, config.chat_template, ends=ends_of(model))
        return cls(model, encoder, replace(collator_of(model, encoder), budget=token_budget))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoder.tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def attend_apart(self, rows: TokenTable) -> None:
        """Lets each row attend by itself, where rows like these are long, this is a CPU and the model takes it."""
        long = int(rows.lengths.sum()) > LONG * len(rows)
        if self.collate.packed and long and not torch.cuda.is_available() and attend_by_rows(self.model):
            self.collate = replace(self.collate, apart=True)

    def logps(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        """(G,) log pi of each row's responses, on the CPU, without gradient."""
        return all_logps(self.model, rows, self.collate)

    def logps_under(self, weights: Snapshot, rows: Sequence[TokenRow]) -> list[Tensor]:
        """(G,) log-probs of each row's responses under a snapshot: log pi_ref, where that is the reference's."""
        with torch.no_grad(), self.swapped(weights):
            return self.logps(rows)

    def sample(
        self, prompts: Sequence[list[int]], responses: int, config: SamplingConfig, seed: int
    ) -> list[list[sampling.Drawn]]:
        """`responses` draws for each prompt of token ids. The same seed, weights and prompts give the same draws."""
        return sampling.sample(self.model, self.encoder, prompts, responses, config, seed)

    def snapshot(self) -> Snapshot:
        """A CPU copy of the trainable parameters."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def put(self, weights: Snapshot) -> None:
        """Copies a snapshot into the model."""
        for name, p in self.model.named_parameters():
            if name in weights:
                p.copy_(weights[name])

    @contextmanager
    def swapped(self, weights: Snapshot) -> Iterator[None]:
        """The model with `weights` in place of its own, which come back at the end."""
        parameters = {name: p for name, p in self.model.named_parameters() if name in weights}
        before = {name: p.data for name, p in parameters.items()}
        try:
            for name, p in parameters.items():
                p.data = weights[name].to(p.device)
            yield
        finally:
            for name, p in parameters.items():
                p.data = before[name]

    def save(self, directory: Path) -> None:
        """Safetensors, config and tokenizer, as AutoModelForCausalLM or PEFT loads them; with LoRA the adapter alone.

        Whole or absent. Raises NotFiniteError where weights are NaN or infinite.
        """
        model = inner(self.model)
        check_weights_finite(model, directory)
        cache = model.config.use_cache
        model.config.use_cache = True
        with whole(directory) as place:
            model.save_pretrained(place, safe_serialization=True)
            self.tokenizer.save_pretrained(place)
        model.config.use_cache = cache

    def check_finite(self, rows: Sequence[TokenRow], stage: str, key: str) -> None:
        """NotFiniteError where weights, or log-probs of some rows, are NaN or infinite: the stage that trained it, and
        the setting to lower."""
        if not_finite(self.model) is None and all_finite(self.logps(rows[:LOOKED_AT])):
            return
        raise NotFiniteError(f"{stage}: the model that it left gives no finite log-probs; lower {key}")

    @torch.no_grad()
    def load_weights(self, directory: Path) -> None:
        """Puts in what `save` left in `directory` from a policy of the same shape, but for the rank of LoRA."""
        model = inner(self.model)
        saved = saved_weights(model, directory)
        if (directory / ADAPTER_FILE).exists():
            from peft import set_peft_model_state_dict

            self.set_rank(*rank_and_alpha(directory))
            set_peft_model_state_dict(model, saved)
        else:
            model.load_state_dict(saved)

    def set_rank(self, rank: int, alpha: float) -> None:
        """Gives LoRA new adapters where its rank or alpha is another; weights must be put in after."""
        model, lora = inner(self.model), lora_of(self.model)
        if lora is None or (lora.r, lora.lora_alpha) == (rank, alpha):
            return
        wanted = copy.deepcopy(lora)
        wanted.r, wanted.lora_alpha = rank, alpha  # type: ignore[assignment]
        model.delete_adapter(ADAPTER)
        model.add_adapter(ADAPTER, wanted)
        model.set_adapter(ADAPTER)

    def merged(self) -> Policy:
        """The policy with its adapter's weights added to the base model's."""
        return replace(self, model=self.model.merge_and_unload())  # type: ignore[operator]

    def digest(self) -> str:
        return digest_of(self.model)


def saved_weights(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """What `directory` holds, by name: an adapter's weights, or all of a model's."""
    if (directory / ADAPTER_FILE).exists():
        return load_file(directory / ADAPTER_FILE)
    check_weights(directory, str(directory))
    check_adapter(directory)
    whole, report = type(model).from_pretrained(  # type: ignore[attr-defined]  # no code but that of the model itself
        directory,
        dtype=next(model.parameters()).dtype,
        attn_implementation="eager",
        output_loading_info=True,
        use_safetensors=True,
        local_files_only=True,
    )
    check_complete(report["missing_keys"], str(directory))
    return whole.state_dict()


def rank_and_alpha(directory: Path) -> tuple[int, float]:
    """Of the adapter in `directory`."""
    record = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    return record["r"], record["lora_alpha"]


def digest_of(model: nn.Module) -> str:
    """A hash of every parameter and buffer, with its name, kind and shape, of the scale of adapters, and of what the
    model's config says besides: heads and activations, say."""
    digest = hashlib.sha256()
    for part in model.modules():
        if isinstance(config := getattr(part, "config", None), PreTrainedConfig):
            about = {key: value for key, value in config.to_dict().items() if key not in UNTOLD and key[:1] != "_"}
            digest.update(json.dumps(about, sort_keys=True, default=str).encode())
            break
    if lora := lora_of(model):
        digest.update(f"lora {lora.r} {lora.lora_alpha}".encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
