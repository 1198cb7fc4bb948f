"""What a run starts from: tokenizer, special tokens and a way to build the model, decided before any weight is read."""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch._guards import detect_fake_mode

from common.checkpoint import CONFIG_FILE
from common.data.corpora import load_data_tokenizer
from common.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from common.errors import CheckpointError, ConfigError
from common.seeding import generator
from diffullama.attention import require_attention, require_bidirectional
from diffullama.config import TrainConfig
from diffullama.loading import find_folder, load_model, read_hf_config, resolve_dtype, tokenizer_folder
from diffullama.lora import ADAPTER_CONFIG, apply_lora, merge, read_adapter_config
from diffullama.model import DiffusionLM
from diffullama.pairs import load_pairs
from diffullama.saving import ARCHITECTURE_FOLDER, quiet_transformers
from diffullama.special_tokens import (
    MASK_TOKEN,
    SpecialTokens,
    add_mask_token,
    check_special_tokens,
    find_family,
    resolve_special_tokens,
)

EMBEDDING_KEYS = ("embed_tokens.weight", "wte.weight")
DROPOUT_OPTIONS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout")


@dataclass
class Start:
    """What a run starts from.

    Attributes:
        config: of the run.
        hf_config: the library's configuration, with as many rows as the model will have.
        tokenizer: with the mask among its tokens, if that was added.
        plain_tokenizer: as it was before.
        special: ids of mask, beginning, end, padding and separator.
        digits: fine-tuning text becomes one token per digit (the released gpt2-medium).
    """

    config: TrainConfig
    hf_config: Any
    tokenizer: Tokenizer
    plain_tokenizer: Tokenizer
    special: SpecialTokens
    digits: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    _is_probed: bool = False

    @property
    def vocab_size(self) -> int:
        return int(self.hf_config.vocab_size)

    @property
    def has_stored_base(self) -> bool:
        """Whether an adapter's base model can be loaded again as it is."""
        return not (self.config.model.from_scratch or self.config.model.add_mask_token)

    def build(self) -> DiffusionLM:
        """A new model: the stored weights, or random ones from torch's global generator; with fresh adapters.

        The information-flow probe runs here, once: a model that is still causal is refused, and an attention backend
        for later that is missing, which would end the run only once attention has opened.
        """
        model = self._finish(self._random() if self.config.model.from_scratch else self._pretrained())
        if not self._is_probed:
            require_bidirectional(model)
            if (opened := self.config.model.opened_attention) is not None:
                require_attention(model.hf, opened)
            self._is_probed = True
        return model

    def sketch(self) -> DiffusionLM:
        """The model with random weights, to be measured; on fake tensors without adapters, which peft cannot build so.

        The adapters' own activations are small beside those of the model below them.
        """
        return self._finish(self._random(), adapters=detect_fake_mode() is None)

    def _finish(self, hf: nn.Module, adapters: bool = True) -> DiffusionLM:
        section, objective = self.config.model, self.config.objective
        # an autoregressive model has no mask: it is saved as what it is, and other programs run it causally
        model = DiffusionLM(hf, self.mask_id, objective.shift or objective.is_causal)
        fuse_activations(model.hf)
        if section.dropout is not None:
            set_dropout(model.hf, section.dropout)
        return (apply_lora(model, self.config.peft) if adapters else model).train()

    def _random(self) -> nn.Module:
        section = self.config.model
        return _from_config(self.hf_config, section.attn_implementation, resolve_dtype(section.dtype))

    @property
    def mask_id(self) -> int | None:
        """The model's mask; None in the autoregressive stages."""
        return None if self.config.objective.is_causal else self.special.mask_id

    def _pretrained(self) -> nn.Module:
        """The library's model with its stored weights, adapters merged, and a row for an added mask.

        Raises: ConfigError if it was adapted with another shift than is asked for.
        """
        section, objective = self.config.model, self.config.objective
        added = section.add_mask_token
        loaded = load_model(
            section.path,
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            mask_token_id=None if added else self.special.mask_id,
            causal_parent=added or objective.is_causal,
        )
        was_adapted = loaded.config.get("is_causal") is False
        if was_adapted and not objective.is_causal and loaded.model.shift != objective.shift:
            raise ConfigError(
                f"objective.shift={str(objective.shift).lower()}, but model.path={section.path} was adapted with "
                f"shift={str(loaded.model.shift).lower()}; set objective.shift={str(loaded.model.shift).lower()}."
            )
        hf = merge(loaded.model).lm
        if added:
            add_mask_token(hf, copy.deepcopy(self.plain_tokenizer), generator(self.config.seed, "mask row"))
        return hf


def prepare(config: TrainConfig) -> Start:
    """Reads configuration and tokenizer, and settles the special tokens.

    Raises: ConfigError for an unknown or impossible mask; CheckpointError, DataError if nothing usable is there.
    """
    section = config.model
    needs_weights = not (section.from_scratch or config.dry_run)
    folder = None
    if section.path is not None:
        folder = find_folder(str(section.path), weights=needs_weights, option="model.path")
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
    plain = copy.deepcopy(tokenizer)
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
    if config.objective.is_finetuning and special.sep_id is None:
        special = replace(special, sep_id=separator_id(tokenizer, config.data.separator))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # a small vocabulary has other ids than the preset
        value = getattr(hf_config, name, None)
        if fits_anyhow and isinstance(value, int):
            setattr(hf_config, name, getattr(special, name.replace("_token", "")))
    metadata = {
        "base_model": section.path or "random weights",
        "max_length": section.length,
        "stage": config.objective.stage,
    }
    return Start(config, hf_config, tokenizer, plain, special, digits, metadata)


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
    hf_config = read_hf_config(folder)
    rows = embedding_rows(folder)
    if rows is not None:  # the released gpt2-medium model has one more than its configuration says
        hf_config.vocab_size = rows
    return hf_config


def embedding_rows(folder: Path) -> int | None:
    """Rows of the stored token embedding, from the headers of safetensors files; None where there are none."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key.endswith(EMBEDDING_KEYS):
                    return int(file.get_slice(key).get_shape()[0])
    return None


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


def separator_id(tokenizer: Tokenizer, text: str) -> int:
    """Id of the token between prompt and answer.

    Raises: ConfigError unless it is one token.
    """
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ConfigError(
            f"data.separator={text!r} is {len(ids)} tokens ({ids}) of this tokenizer; choose a text that is one token."
        )
    return ids[0]


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
    data = config.data
    if data.tokenizer is not None and data.tokenizer.startswith("bpe:") and config.objective.is_finetuning:
        return load_tokenizer(data.tokenizer, documents=pair_texts(config), cache_dir=data.cache_dir)
    if data.tokenizer is not None:
        return load_data_tokenizer(data.tokenizer, data.train, cache_dir=data.cache_dir)
    found = None if folder is None else tokenizer_folder(folder)
    if found is None:
        raise ConfigError(
            f"model.path={config.model.path} comes without a tokenizer; give one with data.tokenizer=..., for example "
            "byte, bpe:1024, a folder or a hub name."
        )
    return load_tokenizer(found)


def pair_texts(config: TrainConfig) -> list[str]:
    """Prompts and answers of the training pairs, which a tokenizer may learn from."""
    data = config.data
    columns = {"prompt_column": data.prompt_column, "answer_column": data.answer_column}
    pairs = load_pairs(data.train, "train", **columns, seed=config.seed, cache_dir=data.cache_dir)
    return [text for pair in pairs for text in pair]


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


def _from_config(hf_config: Any, attn_implementation: str | None, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with quiet_transformers():
        return AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), dtype=dtype, **options)
