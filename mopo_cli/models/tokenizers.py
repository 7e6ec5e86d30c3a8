"""Tokenizers: a model's own, or one trained on the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mopo_cli.base.errors import UserError
from mopo_cli.config.schema import ModelConfig, TokenizerConfig
from mopo_cli.models.hub import base_of_adapter, cannot_load, hub_arguments, is_local, read_config, source

PAD, EOS = "<pad>", "</s>"
TOKENIZER_FILES = ("*tokeniz*", "*vocab*", "*.model", "*.tiktoken", "merges.txt")


# --------------------------------------------------------------------------------------------- tokenizers
def load_tokenizer(config: ModelConfig, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or one trained on `texts`: where model.tokenizer.train says so, or where random weights
    leave no tokenizer to reach. Raises UserError where there is none, or one that knows no text.
    """
    if _trains_tokenizer(config):
        tokenizer = train_tokenizer(texts, replace(config.tokenizer, vocab_size=_vocabulary(config)))
        tokenizer.model_max_length = config.max_length
    else:
        tokenizer = _pretrained_tokenizer(config)
    if config.chat_template not in ("auto", "always"):
        template = Path(config.chat_template)
        if not template.is_file():
            raise UserError(f"model.chat_template={config.chat_template}: must be auto, always or a Jinja file")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def saved_tokenizer(directory: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a run's model; code that lies there too is run only where its config says so."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: its tokenizer has no end token (is its tokenizer_config.json there?)")
    return tokenizer


def _trains_tokenizer(config: ModelConfig) -> bool:
    if config.tokenizer.train and config.init != "random":
        raise UserError(
            "model.tokenizer.train=true needs model.init=random: pretrained weights belong to a tokenizer of their own"
        )
    if config.tokenizer.train or config.init != "random":
        return config.tokenizer.train
    if config.path and is_local(config.path):
        return not _holds_tokenizer(source(config))
    return bool(config.architecture) or not config.path


def _holds_tokenizer(directory: str) -> bool:
    return any(next(Path(directory).glob(pattern), None) for pattern in TOKENIZER_FILES)


def _vocabulary(config: ModelConfig) -> int:
    """Tokens to train: those asked for, as far as the architecture has embeddings for them."""
    size = config.architecture.get("vocab_size")
    if size is None and not config.architecture and config.path:
        size = read_config(config).get_text_config().vocab_size
    return min(config.tokenizer.vocab_size, int(size or config.tokenizer.vocab_size))


def _pretrained_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    path = source(config)
    # transformers builds an empty tokenizer where the files are missing
    missing = f"model.path={path}: it holds no tokenizer (tokenizer.json, …). Copy the model's tokenizer files there"
    if is_local(path) and not _holds_tokenizer(path):
        if (base := base_of_adapter(config)) is not None:
            return _pretrained_tokenizer(base)
        raise UserError(missing)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub_arguments(config))
    except Exception as error:
        raise UserError(cannot_load("tokenizer", config, error)) from error
    if not set(tokenizer("a word", add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}:
        raise UserError(missing)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path={path}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE. With `across_words`, merges may span the spaces inside a sentence (superwords)."""
    tokenizer = Tokenizer(models.BPE())
    if config.across_words:
        sentence = pre_tokenizers.Split(Regex(r"\s*[^.!?\n]+[.!?\n]*|\s+|[.!?\n]+"), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([sentence, byte_level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=EOS)
