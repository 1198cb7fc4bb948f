"""What a run starts from: tokenizer, special tokens and a way to build the model, decided before any weight is read."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.checkpoint import CONFIG_FILE
from common.data.corpora import load_data_tokenizer
from common.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from common.errors import CheckpointError, ConfigError
from common.seeding import generator
from diffullama.attention import require_bidirectional
from diffullama.config import TrainConfig
from diffullama.loading import TOKENIZER_FILES, find_folder, load_model, read_hf_config, resolve_dtype
from diffullama.lora import ADAPTER_CONFIG, apply_lora, read_adapter_config
from diffullama.model import DiffusionLM
from diffullama.saving import ARCHITECTURE_FOLDER, quiet_transformers
from diffullama.special_tokens import (
    MASK_TOKEN,
    SpecialTokens,
    add_mask_token,
    check_special_tokens,
    find_family,
    resolve_special_tokens,
)

DROPOUT_OPTIONS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout")


@dataclass
class Start:
    """What a run starts from.

    Attributes:
        config: of the run.
        hf_config: the library's configuration, with as many rows as the model will have.
        tokenizer: with the mask among its tokens, if that was added.
        special: ids of mask, beginning, end, padding and separator.
        digits: fine-tuning text becomes one token per digit (the released gpt2-medium).
    """

    config: TrainConfig
    hf_config: Any
    tokenizer: Tokenizer
    special: SpecialTokens
    digits: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return int(self.hf_config.vocab_size)

    def build(self) -> DiffusionLM:
        """A new model: the stored weights, or random ones from torch's global generator; with fresh adapters.

        The information-flow probe runs here: a model that is still causal is refused.
        """
        section, objective = self.config.model, self.config.objective
        if section.from_scratch or _is_meta():
            hf = _from_config(self.hf_config, section.attn_implementation).to(resolve_dtype(section.dtype))
            model = DiffusionLM(hf, self.special.mask_id, objective.shift)
        else:
            model = self._pretrained()
        fuse_activations(model.hf)
        if section.dropout is not None:
            set_dropout(model.hf, section.dropout)
        model = apply_lora(model, self.config.peft)
        if not objective.is_causal and not _is_meta():
            require_bidirectional(model)
        return model.train()

    def _pretrained(self) -> DiffusionLM:
        section = self.config.model
        added = section.add_mask_token
        loaded = load_model(
            section.path,
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            mask_token_id=None if added else self.special.mask_id,
            shift=self.config.objective.shift,
            causal_parent=added or self.config.objective.is_causal,
        )
        if not added or loaded.special.mask_id is not None:
            return loaded.model
        tokenizer = copy.deepcopy(loaded.tokenizer)
        mask_id = add_mask_token(loaded.model.hf, tokenizer, generator(self.config.seed, "mask row"))
        return DiffusionLM(loaded.model.hf, mask_id, self.config.objective.shift)


def prepare(config: TrainConfig) -> Start:
    """Reads configuration and tokenizer, and settles the special tokens.

    Raises: ConfigError for an unknown or impossible mask; CheckpointError, DataError if nothing usable is there.
    """
    section = config.model
    folder = None if section.path is None else find_folder(str(section.path))
    hf_config = _architecture(section.architecture) if section.architecture else describe(folder, str(section.path))
    hf_config = copy.deepcopy(hf_config)
    tokenizer = _tokenizer(config, folder)
    fits_anyhow = section.from_scratch and section.architecture is not None
    if fits_anyhow:
        hf_config.vocab_size = tokenizer.vocab_size
    elif tokenizer.vocab_size > hf_config.vocab_size + 1:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.path={section.path} has "
            f"{hf_config.vocab_size} embedding rows; use the model's own (data.tokenizer=null)."
        )
    digits = (family := find_family(hf_config, tokenizer)) is not None and family.isolates_digits
    if section.add_mask_token:
        mask_id = name_mask(tokenizer)
        hf_config.vocab_size = max(int(hf_config.vocab_size), mask_id + 1)
        special = resolve_special_tokens(tokenizer, hf_config, mask_token_id=mask_id)
    else:
        special = resolve_special_tokens(
            tokenizer,
            hf_config,
            mask_token_id=section.mask_token_id,
            require_mask=not config.objective.is_causal,
        )
    check_special_tokens(special, int(hf_config.vocab_size))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # a small vocabulary has other ids than the preset
        value = getattr(hf_config, name, None)
        if fits_anyhow and isinstance(value, int):
            setattr(hf_config, name, getattr(special, name.replace("_token", "")))
    metadata = {
        "base_model": section.path or "random weights",
        "max_length": section.length,
        "stage": config.objective.stage,
    }
    return Start(config, hf_config, tokenizer, special, digits, metadata)


def describe(folder: Path, name: str) -> Any:
    """The library's configuration of a model folder, a run of ours, or an adapter's base model; reads no weight."""
    for place in (folder / ARCHITECTURE_FOLDER, folder.parent.parent / ARCHITECTURE_FOLDER):
        if (place / CONFIG_FILE).is_file():
            return read_hf_config(place)
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_adapter_config(folder).get("base_model_name_or_path")
        if not base:
            raise CheckpointError(f"{folder / ADAPTER_CONFIG} names no base model; merge it first (diffullama.export).")
        return describe(find_folder(str(base)), str(base))
    return read_hf_config(folder)


def name_mask(tokenizer: Tokenizer) -> int:
    """Id of the tokenizer's mask token, which is added where the tokenizer can hold one; the next free id else."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.vocab_size
    raw = tokenizer.tokenizer
    if raw.mask_token_id is None:
        raw.add_special_tokens({"mask_token": MASK_TOKEN})
        tokenizer.vocab_size = len(raw)
    return int(raw.mask_token_id)


def fuse_activations(hf: nn.Module) -> None:
    """GPT-2's activation in one kernel instead of eight, in place: the same function up to rounding (1e-7).

    The composed form keeps five tensors of four times the width for the backward pass, more than all else in a block.
    """
    from transformers.activations import ACT2FN, NewGELUActivation

    for module in hf.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    if getattr(hf.config, "activation_function", None) == "gelu_new":
        hf.config.activation_function = "gelu_pytorch_tanh"


def set_dropout(hf: nn.Module, probability: float) -> None:
    """Sets every dropout of a transformers model, in place."""
    for name in DROPOUT_OPTIONS:
        if hasattr(hf.config, name):
            setattr(hf.config, name, probability)
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = probability


def _tokenizer(config: TrainConfig, folder: Path | None) -> Tokenizer:
    name = config.data.tokenizer
    if name is not None:
        return load_data_tokenizer(name, config.data.train, cache_dir=config.data.cache_dir)
    places = () if folder is None else (folder, folder / "tokenizer", folder.parent.parent / "tokenizer")
    found = next((place for place in places if any((place / file).is_file() for file in TOKENIZER_FILES)), None)
    if found is None:
        raise ConfigError(
            f"model.path={config.model.path} comes without a tokenizer; give one with data.tokenizer=..., for example "
            "byte, bpe:1024, a folder or a hub name."
        )
    return load_tokenizer(found)


def _architecture(options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    options = dict(options)
    kind = options.pop("model_type", None)
    if not kind:
        raise ConfigError("model.architecture.model_type is missing; give gpt2, llama, qwen2, qwen3 or mistral.")
    try:
        with quiet_transformers():
            return AutoConfig.for_model(kind, **options)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"model.architecture cannot be built: {reason}; see the options of {kind}.") from None


def _from_config(hf_config: Any, attn_implementation: str | None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with quiet_transformers():
        return AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), **options)


def _is_meta() -> bool:
    return torch.get_default_device().type == "meta"
