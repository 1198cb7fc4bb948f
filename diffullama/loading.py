"""Models from disk: our runs and exports, plain Hugging Face models, the released checkpoints, adapters, the hub.

``load_model`` accepts

* a run folder or a checkpoint folder of ours (the newest complete checkpoint, moving average);
* a folder that ``save_model`` wrote, or any causal language model in the hub's format (one file or shards);
* the released models: diffugpt-s and -m (wrapper keys), diffullama (shards), diffullama-gsm (an adapter);
* an adapter folder of peft, in the library's or the released naming, with its base model;
* a hub name such as ``diffusionfamily/diffugpt-s``.

``save_model`` is its counterpart (``saving.py``).
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import CONFIG_FILE, MANIFEST, checkpoints_dir, list_checkpoints, load_weights
from common.conversion import from_config
from common.data.tokenizer import BYTE_CONFIG_FILE, Tokenizer, load_tokenizer
from common.errors import CheckpointError, ConfigError, DataError
from common.evaluation.masked_model import MaskedLanguageModel
from common.precision import autocast_forward, resolve_precision
from diffullama.convert import embedding_key, fit_state, has_weights, read_folder, to_hf_keys
from diffullama.lora import (
    ADAPTER_CONFIG,
    PeftConfig,
    apply_lora,
    load_adapter,
    load_trained_state,
    read_adapter_config,
    split_trained_state,
)
from diffullama.model import DiffusionLM
from diffullama.saving import ARCHITECTURE_FOLDER, METADATA_FILE, quiet_transformers, save_model, write_architecture
from diffullama.special_tokens import SpecialTokens, resolve_special_tokens

__all__ = ["LoadedModel", "load_denoiser", "load_model", "save_model", "write_architecture"]

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
TOKENIZER_FILES = (BYTE_CONFIG_FILE, "tokenizer.json", "vocab.json", "tokenizer.model")
DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model ready to be used, and what was stored with it.

    Attributes:
        model: in eval mode, on the device asked for.
        tokenizer: None, with a warning, if none could be found.
        special: ids of mask, beginning, end, padding, separator.
        config: our metadata (``quintet.json``); of a run also its configuration, under ``training``.
        source: what was loaded, for reports.
    """

    model: DiffusionLM
    tokenizer: Tokenizer | None
    special: SpecialTokens
    config: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def length(self) -> int | None:
        """Length that the model was adapted to, where that is known; else its longest."""
        return self.config.get("max_length") or self.model.max_length

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises: DataError if there is none.
        """
        if self.tokenizer is None:
            raise DataError(f"{self.source or 'the model'} comes without a tokenizer; give one with tokenizer=....")
        return self.tokenizer


@dataclass
class _Parts:
    """What a folder holds: enough to build the model."""

    hf_config: Any
    state: dict[str, Tensor]
    metadata: dict[str, Any]
    tokenizer_folder: str | None
    peft: PeftConfig | None = None  # of a run; ``state`` then holds the trained parts too
    adapter: Path | None = None  # folder of an adapter for this base model


def load_model(
    path_or_hub_name: str | Path,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    mask_token_id: int | None = None,
    shift: bool | None = None,
    causal_parent: bool = False,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    ema: bool = True,
    strict: bool = True,
) -> LoadedModel:
    """The model stored under a path or hub name; see the module's list of what is accepted.

    Args:
        device: where the model goes.
        dtype: of the parameters; None: float32 (run it under autocast), ``"auto"``: as stored.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None: the library's choice.
        mask_token_id: an existing id as the mask; None: what is stored, or the family's.
        shift: whether a position is predicted by the one before it; None: what is stored, or true.
        causal_parent: a purely autoregressive model is wanted: no mask is needed.
        base: the model that an adapter belongs to; None: the one its configuration names.
        tokenizer: name or folder; None: the one stored with the model.
        ema: the moving average of the weights, where a run kept one.
        strict: False: weights that do not fit are left out, with a warning that lists them.

    Raises: CheckpointError if nothing loadable is there, a file is missing or damaged, or its tensors fit another model
        (all are named); ConfigError for an unknown or impossible mask, or an attention backend that is missing.
    """
    name = str(path_or_hub_name)
    parts = _read(find_folder(name), name, ema=ema, base=base)
    hf_config, metadata = parts.hf_config, parts.metadata
    found_tokenizer = _load_tokenizer(tokenizer, parts.tokenizer_folder, name)
    frozen, trained = (parts.state, {}) if parts.peft is None else split_trained_state(parts.state)
    build = _skeleton(hf_config, frozen, name)
    special = resolve_special_tokens(
        found_tokenizer, hf_config, mask_token_id=mask_token_id, require_mask=not causal_parent
    )
    if shift is None:
        shift = bool(metadata.get("diffusion_shift", getattr(hf_config, "diffusion_shift", True)))
    hf = build(frozen, dtype, attn_implementation, strict)
    model = DiffusionLM.from_causal_lm(hf, special.mask_id, shift)
    if parts.peft is not None:
        # fresh adapters of any start: those computed from the weights would change weights that were changed already
        model = apply_lora(model, replace(parts.peft, init="default"))
        load_trained_state(model, trained, name)
    if parts.adapter is not None:
        model = load_adapter(model, parts.adapter)
    metadata = {**metadata, "mask_token_id": special.mask_id, "diffusion_shift": shift}
    metadata.setdefault("max_length", _trained_length(hf_config))
    return LoadedModel(model.eval().to(device), found_tokenizer, special, metadata, name)


def warn_unless_adapted(loaded: LoadedModel) -> None:
    """Warns if a model is to be run by diffusion whose folder says that it was trained autoregressively."""
    if loaded.config.get("is_causal") is True:
        logger.warning(
            "%s was trained autoregressively and never adapted, so that diffusion gives noise; adapt it first "
            "(diffullama.train model.path=%s), or evaluate it with mode=causal.",
            loaded.source,
            loaded.source,
        )


def load_denoiser(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    ema: bool = True,
    precision: str = "fp32",
    tokenizer: str | None = None,
    length: int | None = None,
    base: str | None = None,
    mask_token_id: int | None = None,
    shift: bool | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
) -> MaskedLanguageModel:
    """The model as evaluators of any masked-token model take it (``--model_args loader=diffullama,pretrained=...``).

    Args:
        precision: auto, bf16, fp16 or fp32, by autocast.
        length: longest sequence; None: the length that the model was adapted to.
        others: as in ``load_model``.

    Raises: as ``load_model``; DataError without a usable tokenizer.
    """
    from diffullama.scoring import token_nll

    device = torch.device(device)
    loaded = load_model(
        path,
        device,
        ema=ema,
        tokenizer=tokenizer,
        base=base,
        mask_token_id=mask_token_id,
        shift=shift,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    warn_unless_adapted(loaded)
    autocast_forward(loaded.model, resolve_precision(precision, device), device)
    return MaskedLanguageModel(
        denoise=loaded.model.denoise,
        mask_id=loaded.special.mask_id,
        length=length or loaded.length or 1024,
        tokenizer=loaded.require_tokenizer(),
        device=device,
        name=str(path),
        nll=token_nll(loaded.model),
    )


# ---------------------------------------------------------------- reading


def find_folder(name: str, *, weights: bool = True, option: str = "model_path") -> Path:
    """The local folder called ``name``, or the hub repository of that name, downloaded.

    Args:
        weights: False: configuration and tokenizer are enough, so that little is downloaded.
        option: that gave the name, for messages.

    Raises: CheckpointError if there is neither; says how to use a local folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{option}={name} is a file; give the folder that holds it and its {CONFIG_FILE}.")
    if not HUB_NAME.fullmatch(name) or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{option}={name} does not exist; give a run folder, a model folder or a hub name (owner/name)."
        )
    return _download(name, weights, option)


def _download(name: str, weights: bool, option: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    described = ["*.json", "*.model", "*.txt", "*.jinja"]
    first = [*described, "*.safetensors"] if weights else described
    try:
        folder = Path(snapshot_download(name, allow_patterns=first, ignore_patterns="*/*"))
        if weights and not has_weights(folder) and not (folder / ADAPTER_CONFIG).is_file():
            folder = Path(snapshot_download(name, allow_patterns=[*described, "*.bin"], ignore_patterns="*/*"))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"{option}={name} is no local folder and could not be fetched from the hub ({type(error).__name__}: "
            f"{lines[0][:160]}). Without hub access, copy the repository's {CONFIG_FILE}, weights and tokenizer into a "
            "folder and give that folder's path."
        ) from None


def _read(folder: Path, name: str, *, ema: bool, base: str | Path | None) -> _Parts:
    if list_checkpoints(folder) or (folder / MANIFEST).is_file():
        return _read_run(folder, ema)
    if (folder / ADAPTER_CONFIG).is_file():
        return _read_adapter(folder, base)
    if has_weights(folder):
        return _Parts(read_hf_config(folder), read_folder(folder), _read_metadata(folder), tokenizer_folder(folder))
    for inner in (folder / "export", folder / ARCHITECTURE_FOLDER):
        if has_weights(inner):
            return _read(inner, name, ema=ema, base=base)
    present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    if checkpoints_dir(folder).is_dir():
        raise CheckpointError(f"{folder} has no complete checkpoint yet; train at least one checkpoint interval.")
    raise CheckpointError(
        f"model_path={name} holds no model: {CONFIG_FILE} with weights (model.safetensors, shards with an index, or "
        f"pytorch_model.bin), {ADAPTER_CONFIG} of an adapter, or checkpoints/ of a run is needed; it has {present}."
    )


def _read_run(folder: Path, ema: bool) -> _Parts:
    run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    state, config = load_weights(folder, ema=ema)
    described = run / ARCHITECTURE_FOLDER
    if not (described / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{described / CONFIG_FILE} is missing, so the model's shape is unknown; copy the whole run folder."
        )
    section = dict(config.get("peft") or {})
    known = {option.name for option in fields(PeftConfig)}
    peft = from_config(PeftConfig, {key: value for key, value in section.items() if key in known}, "peft")
    metadata = {**_read_metadata(described), "training": config}
    state = {key.removeprefix("module.").replace("_orig_mod.", "").removeprefix("lm."): v for key, v in state.items()}
    return _Parts(
        _with_metadata(read_hf_config(described), metadata),
        state,
        metadata,
        tokenizer_folder(folder),
        peft=peft if peft.kind != "none" else None,
    )


def _read_adapter(folder: Path, base: str | Path | None) -> _Parts:
    named = base or read_adapter_config(folder).get("base_model_name_or_path")
    if not named:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} names no base model; give it with base=....")
    try:
        below = find_folder(str(named), option="base")
        if (below / ADAPTER_CONFIG).is_file():
            raise CheckpointError(f"base={named} is an adapter itself; give the model below it, or merge it first.")
        parts = _read(below, str(named), ema=True, base=None)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base model of the adapter {folder} cannot be loaded; give base=.... {error}"
        ) from None
    if parts.peft is not None:
        raise CheckpointError(f"base={named} has adapters of its own; merge them first (diffullama.export).")
    own = _read_metadata(folder)
    metadata = {**parts.metadata, **own}
    return _Parts(
        _with_metadata(parts.hf_config, metadata),
        parts.state,
        metadata,
        _tokenizer_in(folder) or parts.tokenizer_folder,
        adapter=folder,
    )


def read_hf_config(folder: Path | str) -> Any:
    """The transformers configuration of a folder, with what ``quintet.json`` says about special tokens.

    Raises: CheckpointError if it is missing, damaged, or of an unknown architecture.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder / CONFIG_FILE} is missing; the weights beside it need their configuration.")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} is no usable configuration ({str(error).strip().splitlines()[0][:200]}); copy it "
            "again."
        ) from None
    return _with_metadata(config, _read_metadata(folder))


def _with_metadata(config: Any, metadata: Mapping[str, Any]) -> Any:
    for key in ("mask_token_id", "special_tokens"):
        if metadata.get(key) is not None:
            setattr(config, key, metadata[key])
    return config


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA_FILE
    if not path.is_file():
        return {}
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({error}); copy it again.") from None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} holds a {type(metadata).__name__}; the metadata of a saved model is needed.")
    return metadata


def _trained_length(hf_config: Any) -> int | None:
    """The length that the released models name in their configuration."""
    tasks = getattr(hf_config, "task_specific_params", None) or {}
    return (tasks.get("text-generation") or {}).get("max_length")


# ---------------------------------------------------------------- building


def _skeleton(hf_config: Any, state: Mapping[str, Tensor], source: str) -> Callable[..., nn.Module]:
    """Checks the architecture without allocating a weight; what it returns builds the model.

    The embedding's rows are those of the weights: the released gpt2-medium model has one more than its configuration.
    """
    from transformers import AutoModelForCausalLM

    def empty() -> nn.Module:
        with quiet_transformers(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(hf_config)

    try:
        hf = empty()
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"{source} is no causal language model that transformers builds ({str(error).splitlines()[0][:200]})."
        ) from None
    embedding = to_hf_keys(state, hf).get(embedding_key(hf))
    if embedding is not None and embedding.dim() == 2 and len(embedding) != hf_config.vocab_size:
        logger.info("%s: vocab_size=%d, from its weights (not %d)", source, len(embedding), hf_config.vocab_size)
        hf_config.vocab_size = len(embedding)
        hf = empty()

    def build(
        weights: Mapping[str, Tensor], dtype: torch.dtype | str | None, attn_implementation: str | None, strict: bool
    ) -> nn.Module:
        fitting = fit_state(hf, weights, source=source, strict=strict)
        options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        try:
            with quiet_transformers():
                return type(hf).from_pretrained(
                    None, config=hf_config, state_dict=fitting, dtype=resolve_dtype(dtype, fitting), **options
                )
        except (ImportError, ValueError) as error:
            if attn_implementation is None:
                raise
            raise ConfigError(
                f"attn_implementation={attn_implementation} cannot be used "
                f"({str(error).strip().splitlines()[0][:200]}); use sdpa, or install requirements-gpu.txt for flash "
                "kernels."
            ) from None

    return build


def resolve_dtype(dtype: torch.dtype | str | None, state: Mapping[str, Tensor] | None = None) -> torch.dtype:
    """The torch dtype for a name; None: float32, ``"auto"``: that of the weights.

    Raises: ConfigError for an unknown name.
    """
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        kinds = [value.dtype for value in (state or {}).values() if value.is_floating_point()]
        return kinds[0] if kinds else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not known; choose auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


# ---------------------------------------------------------------- tokenizers


def tokenizer_folder(folder: Path | str) -> str | None:
    """Where the tokenizer of a model folder, a run, one of its checkpoints, or an adapter's base model is; or None.

    Raises: CheckpointError if an adapter's base model cannot be found.
    """
    folder = Path(folder)
    run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    for place in (folder, run, run / "tokenizer", run / ARCHITECTURE_FOLDER, run / "export"):
        if (found := _tokenizer_in(place)) is not None:
            return found
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_adapter_config(folder).get("base_model_name_or_path")
        return tokenizer_folder(find_folder(str(base))) if base else None
    return None


def _tokenizer_in(folder: Path) -> str | None:
    return str(folder) if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def _load_tokenizer(given: str | Path | None, stored: str | None, source: str) -> Tokenizer | None:
    if given is not None:
        return load_tokenizer(given)
    if stored is None:
        logger.warning("%s comes without a tokenizer; give one with tokenizer=....", source)
        return None
    with quiet_transformers():
        return load_tokenizer(stored)
