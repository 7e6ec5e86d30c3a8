"""The parts of a wrapped model: what is inside an adapter or a wrapper, its backbone, its attention window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mopo_cli.base.errors import NotFiniteError, UserError

if TYPE_CHECKING:
    from peft import LoraConfig


def compute_in(causal: nn.Module, dtype: torch.dtype) -> None:
    """Mixed precision: matrix products of this model, and of copies of its transformer, in `dtype`."""
    for module in (causal, backbone_of(causal)):
        if module is not None:
            module.compute_dtype = dtype  # type: ignore[assignment]


def computing(module: nn.Module) -> AbstractContextManager[object]:
    """Autocast to the module's compute dtype, where it has one of its own."""
    dtype = getattr(module, "compute_dtype", None)
    device = next(module.parameters()).device.type
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


@contextmanager
def in_own_dtype(causal: nn.Module) -> Iterator[None]:
    """Without mixed precision: for comparisons of two ways to the same number, finer than bfloat16's products."""
    mixed = [module for module in causal.modules() if getattr(module, "compute_dtype", None) is not None]
    kept = [module.compute_dtype for module in mixed]
    for module in mixed:
        module.compute_dtype = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, dtype in zip(mixed, kept, strict=True):
            module.compute_dtype = dtype  # type: ignore[assignment]


def attention_window(causal: nn.Module) -> int | None:
    """The shortest window that some layer's attention is limited to, None where all layers see the whole context."""
    config = causal.config.get_text_config()  # type: ignore[union-attr]
    layers = getattr(config, "layer_types", None)
    if layers and all(kind == "full_attention" for kind in layers):
        return None
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((size for size in sizes if size), default=None)


def unwrap(model: nn.Module) -> nn.Module:
    """The causal language model below PEFT and the wrappers of data parallelism; adapters stay active in its layers."""
    while hasattr(model, "module"):
        model = model.module  # type: ignore[assignment]
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The transformer without its output head, or None where the model does not expose one."""
    if isinstance(model, PreTrainedModel):
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        if isinstance(decoder, PreTrainedModel) and decoder is not model:
            return decoder
        base = model.base_model
        return base if base is not model else None
    return None


def check_weights_finite(model: nn.Module, directory: Path) -> None:
    """NotFiniteError where weights that are to be written to `directory` are NaN or infinite."""
    if (name := not_finite(model)) is not None:
        raise NotFiniteError(f"{directory}: not written, since weights are not finite ({name})")


def check_complete(missing: Iterable[str], what: str, files: str = "its files") -> None:
    """UserError where weights are not in a model's files: transformers would draw these at random and go on."""
    names = sorted(missing)
    if names:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise UserError(f"{what}: {len(names)} weights are not in {files}: {shown}")


ADAPTER = "default"  # what PEFT calls a model's only adapter


@torch.no_grad()
def not_finite(model: nn.Module) -> str | None:
    """The name of a parameter that holds NaN or infinity; None where there is none. Frozen ones are not looked at
    where some are trained."""
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    named = [(name, p) for name, p in named if p.requires_grad] or named
    finite = torch.stack([torch.isfinite(p).all().cpu() for _, p in named]) if named else torch.ones(0)
    return None if finite.all() else named[int(finite.int().argmin())][0]


def inner(policy: nn.Module) -> Any:
    """The model below the wrappers of data parallelism, with its adapters."""
    while hasattr(policy, "module"):
        policy = policy.module  # type: ignore[assignment]
    return policy


# --------------------------------------------------------------------------------------------- adapters
def lora_of(policy: nn.Module) -> LoraConfig | None:
    """The config of a policy's adapter, None where all its weights are trained."""
    configs = getattr(inner(policy), "peft_config", None)
    return configs[ADAPTER] if configs else None
