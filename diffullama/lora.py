"""Low-rank adapters through peft: built, saved and loaded in the library's naming or the released one.

The released adapter (diffullama-gsm) was made on a wrapper class, whose module names the library's model does not have;
loaded as it is, every key would be ignored without a word. Here names are translated and nothing is ignored.
Source: specification 3.3, 3.4 (j, k), 9.1.
"""

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.checkpoint import write_json
from common.config import require_at_least, require_choice
from common.errors import CheckpointError, ConfigError
from diffullama.convert import WRAPPER_BACKBONE, embedding_key, head_key, is_tied, read_file
from diffullama.model import DiffusionLM

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NAMINGS = ("peft", "reference")
PEFT_PREFIX = "base_model.model."
EMBEDDING_NAMES = ("embed_tokens", "wte", "embedding", "embeddings")  # any of them means the family's own
ADAPTER = "default"  # peft's name for the only adapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What is trained: everything, or low-rank adapters over a frozen model."""

    kind: Literal["none", "lora"] = "none"
    r: int = 16  # rank
    alpha: float = 32.0  # the update is scaled by alpha / r
    dropout: float = 0.0  # on the adapters' input
    targets: str | list[str] = "all"  # all linear layers of the blocks, or their names (c_attn, q_proj, ...)
    modules_to_save: list[str] = field(default_factory=list)  # trained whole, e.g. [embed_tokens]
    train_mask_row: bool = False  # also the mask's row of the embedding: D numbers instead of V x D
    rslora: bool = False  # scale by alpha / sqrt(r)
    dora: bool = False  # decompose into magnitude and direction
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"  # of the adapters

    def __post_init__(self) -> None:
        require_choice("peft.kind", self.kind, ("none", "lora"))
        require_choice("peft.init", self.init, ("default", "gaussian", "pissa", "olora"))
        require_at_least("peft.r", self.r, 1)
        if not self.alpha > 0:
            raise ConfigError(f"peft.alpha={self.alpha} must be positive; 2 x peft.r is common.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"peft.dropout={self.dropout} must lie in [0, 1).")
        if isinstance(self.targets, str) and self.targets != "all":
            raise ConfigError(
                f"peft.targets={self.targets} must be all or a list, e.g. 'peft.targets=[{self.targets}]'."
            )
        if not self.targets:
            raise ConfigError("peft.targets is empty; name layers, or all.")
        if self.train_mask_row and any(name in EMBEDDING_NAMES for name in self.modules_to_save):
            raise ConfigError(
                f"peft.train_mask_row=true and peft.modules_to_save={self.modules_to_save} both train the mask's row; "
                "leave one of them out."
            )


# ---------------------------------------------------------------- building


def apply_lora(model: DiffusionLM, config: PeftConfig) -> DiffusionLM:
    """The model with fresh adapters, which alone are trained; the same model for ``kind=none``.

    The update is zero at first, so that predictions do not change. With tied matrices (GPT-2) ``modules_to_save`` of
    one of them means both, which stay one tensor.

    Raises: ConfigError if a name in ``targets`` or ``modules_to_save`` matches no module.
    """
    if config.kind == "none":
        return model
    if has_adapter(model):
        raise ConfigError("the model has adapters already; merge them first (diffullama.export).")
    import peft

    hf = model.hf
    targets = _resolve_targets(hf, config.targets)
    whole = _resolve_whole_modules(hf, config.modules_to_save)
    both = [_leaf(embedding_key(hf)), _leaf(head_key(hf))]
    tied = is_tied(hf)
    if tied and set(whole) & set(both):
        logger.warning(
            "peft.modules_to_save=%s: %s ties embedding and head, so both are trained as one matrix.",
            config.modules_to_save,
            type(hf).__name__,
        )
        whole = list(dict.fromkeys([*whole, *both]))
    rows = {_leaf(embedding_key(hf)): [model.mask_id]} if config.train_mask_row else None
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha if config.alpha % 1 else int(config.alpha),
        lora_dropout=config.dropout,
        target_modules=targets,
        modules_to_save=whole or None,
        trainable_token_indices=rows,
        ensure_weight_tying=tied and bool(set(whole) & set(both)),
        fan_in_fan_out=_all_conv1d(hf, targets),
        use_rslora=config.rslora,
        use_dora=config.dora,
        init_lora_weights=True if config.init == "default" else config.init,
    )
    return _with_adapter(model, lora)


def _with_adapter(model: DiffusionLM, lora: Any) -> DiffusionLM:
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they are about (tying, fan_in_fan_out) is decided above
            adapted = peft.get_peft_model(model.hf, lora, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(f"peft cannot adapt {type(model.hf).__name__}: {str(error).splitlines()[0]}") from None
    wrapped = DiffusionLM(adapted, model.mask_id, model.shift)
    return wrapped.train(model.training)


def linear_layers(hf: nn.Module) -> dict[str, nn.Module]:
    """The backbone's linear layers by name, GPT-2's ``Conv1D`` included, the head not."""
    from transformers.pytorch_utils import Conv1D

    head = hf.get_output_embeddings()
    return {
        name: module
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def _resolve_targets(hf: nn.Module, targets: str | list[str]) -> list[str]:
    names = linear_layers(hf)
    leaves = sorted({name.rpartition(".")[2] for name in names})
    if targets == "all":
        return leaves
    for target in targets:
        if target == _leaf(head_key(hf)):
            raise ConfigError(
                f"peft.targets={targets} holds the head {target}, whose product and loss are one step; train it whole "
                f"with peft.modules_to_save=[{target}]."
            )
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"peft.targets={targets}: {target} matches no linear layer of {type(hf).__name__}; it has "
                f"{', '.join(leaves)}."
            )
    return list(targets)


def _resolve_whole_modules(hf: nn.Module, names: list[str]) -> list[str]:
    embedding, modules = _leaf(embedding_key(hf)), [name for name, _ in hf.named_modules() if name]
    resolved = [embedding if name in EMBEDDING_NAMES else name for name in names]
    for given, name in zip(names, resolved, strict=True):
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            leaves = sorted({module.rpartition(".")[2] for module in modules if not module.split(".")[-1].isdigit()})
            raise ConfigError(
                f"peft.modules_to_save={names}: {given} matches no module of {type(hf).__name__}; it has "
                f"{', '.join(leaves)}."
            )
    return list(dict.fromkeys(resolved))


def _all_conv1d(hf: nn.Module, targets: list[str]) -> bool:
    """Whether the targeted layers keep their weights as [in, out]."""
    chosen = [
        module
        for name, module in linear_layers(hf).items()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    return bool(chosen) and not any(isinstance(module, nn.Linear) for module in chosen)


def _leaf(key: str) -> str:
    """``wte`` of ``transformer.wte.weight``."""
    return key.removesuffix(".weight").rpartition(".")[2]


def has_adapter(model: DiffusionLM) -> bool:
    """Whether peft has wrapped the model."""
    return hasattr(model.lm, "get_base_model")


def merge(model: DiffusionLM) -> DiffusionLM:
    """The model with its adapters added to the weights, in place of the adapted one; unchanged if it has none."""
    if not has_adapter(model):
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that an untied head is untied
        merged = model.lm.merge_and_unload()
    if merged.config.tie_word_embeddings and not is_tied(merged):
        merged.config.tie_word_embeddings = False
    return DiffusionLM(merged, model.mask_id, model.shift).train(model.training)


# ---------------------------------------------------------------- names


def to_reference_names(state: Mapping[str, Tensor], hf: nn.Module) -> dict[str, Tensor]:
    """An adapter's tensors under the names of the released wrapper (``base_model.model.denoise_model...``)."""
    embedding, backbone = f"{PEFT_PREFIX}{embedding_key(hf)}", f"{PEFT_PREFIX}{hf.base_model_prefix}."
    renamed = {}
    for key, value in state.items():
        if key == embedding:
            key = f"{PEFT_PREFIX}embed_tokens.weight"
        elif key.startswith(backbone):
            key = f"{PEFT_PREFIX}{WRAPPER_BACKBONE}{key.removeprefix(backbone)}"
        renamed[key] = value
    return renamed


def to_peft_names(state: Mapping[str, Tensor], hf: nn.Module) -> dict[str, Tensor]:
    """An adapter's tensors of either naming under those that peft gives the library's model."""
    renamed = {}
    for key, value in state.items():
        key = key.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        key = key.replace(f".lora_A.{ADAPTER}.", ".lora_A.").replace(f".lora_B.{ADAPTER}.", ".lora_B.")
        inner = key.removeprefix(PEFT_PREFIX)
        if inner == "embed_tokens.weight":
            inner = embedding_key(hf)
        elif inner.startswith(WRAPPER_BACKBONE):
            inner = f"{hf.base_model_prefix}.{inner.removeprefix(WRAPPER_BACKBONE)}"
        renamed[PEFT_PREFIX + inner] = value
    return renamed


# ---------------------------------------------------------------- files


def adapter_state(model: DiffusionLM) -> dict[str, Tensor]:
    """The trained tensors under peft's names.

    Raises: ConfigError if the model has no adapter.
    """
    if not has_adapter(model):
        raise ConfigError("the model has no adapter to save; save it whole (diffullama.loading.save_model).")
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model.lm, adapter_name=ADAPTER, save_embedding_layers=False)
    return {key: value.detach() for key, value in state.items()}


def save_adapter(
    folder: Path | str,
    model: DiffusionLM,
    naming: str = "peft",
    *,
    base_model: str | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json`` into a folder.

    Args:
        naming: ``peft``: loads on the library's model, with peft alone too; ``reference``: loads on the wrapper of the
            released code.
        base_model: what the adapter belongs to, written into its configuration; None: the name the model has.
        state: peft's names and tensors, e.g. gathered from several processes; None: the model's own.

    Raises: ConfigError for an unknown naming, or a trained mask row, which the released code cannot read.
    """
    require_choice("naming", naming, NAMINGS)
    folder = Path(folder)
    tensors = dict(adapter_state(model) if state is None else state)
    config = model.lm.peft_config[ADAPTER].to_dict()
    if naming == "reference":
        if config.get("trainable_token_indices"):
            raise ConfigError(
                "naming=reference has no place for a single trained row (peft.train_mask_row=true); use naming=peft, "
                "or merge the adapter."
            )
        tensors = to_reference_names(tensors, model.hf)
        names = {_leaf(embedding_key(model.hf)): "embed_tokens"}
        config["modules_to_save"] = [names.get(name, name) for name in config.get("modules_to_save") or []] or None
    config["base_model_name_or_path"] = base_model or getattr(model.config, "name_or_path", None) or None
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
    }
    save_file(contiguous, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    write_json(folder / ADAPTER_CONFIG, {**plain, "inference_mode": True})
    return folder


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises: CheckpointError if it is missing, damaged, or not of a low-rank adapter.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {folder} is no adapter folder.") from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({error}); copy it again.") from None
    if kind != "LORA":
        raise CheckpointError(f"{path} describes an adapter of type {kind}; LORA can be loaded.")
    return config


def load_adapter(model: DiffusionLM, folder: Path | str) -> DiffusionLM:
    """The model with the adapter of a folder, in peft's naming or the released one; its weights stay as they are.

    Raises: CheckpointError naming every tensor of the adapter that the model has no place for, or lacks.
    """
    import peft

    folder, hf = Path(folder), model.hf
    if has_adapter(model):
        raise ConfigError(f"the model has adapters already; merge them before {folder} is loaded.")
    stored = read_adapter_config(folder)
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has {ADAPTER_CONFIG} but neither {' nor '.join(ADAPTER_FILES)}; copy it too.")
    state = to_peft_names(read_file(file), hf)
    whole = _resolve_whole_modules(hf, list(stored.get("modules_to_save") or []))
    for key in (
        embedding_key(hf),
        head_key(hf),
    ):  # saved beside the adapter, although the configuration does not say so
        if PEFT_PREFIX + key in state and _leaf(key) not in whole:
            whole.append(_leaf(key))
    known = {option.name for option in peft.LoraConfig.__dataclass_fields__.values() if option.init}
    options = {key: value for key, value in stored.items() if key in known}
    targets = options.get("target_modules")
    if isinstance(targets, list):
        # a wrapper's full names end in the library's
        targets = [target.rpartition(WRAPPER_BACKBONE)[2] for target in targets]
        targets = _resolve_targets(hf, targets)
        options["fan_in_fan_out"] = _all_conv1d(hf, targets)
    options |= {"target_modules": targets, "modules_to_save": whole or None, "inference_mode": False}
    if stored.get("trainable_token_indices"):
        options["trainable_token_indices"] = stored["trainable_token_indices"]
    pair = {_leaf(embedding_key(hf)), _leaf(head_key(hf))}
    if is_tied(hf) and len(pair & set(whole)) == 1:
        logger.warning(
            "%s holds %s of a model that ties embedding and head; they become two matrices.",
            folder,
            ", ".join(pair & set(whole)),
        )
    adapted = _with_adapter(model, peft.LoraConfig(**options))
    _load_adapter_state(adapted, state, str(folder))
    return adapted


def _load_adapter_state(model: DiffusionLM, state: Mapping[str, Tensor], source: str) -> None:
    from peft import set_peft_model_state_dict

    own = adapter_state(model)
    problems = [f"missing {key} {tuple(own[key].shape)}" for key in own if key not in state]
    problems += [f"unexpected {key} {tuple(state[key].shape)}" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}"
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]
    if problems:
        raise CheckpointError(
            f"the adapter {source} does not fit {type(model.hf).__name__} ({len(problems)} differences); give the base "
            "model it was trained on with base=...:\n  " + "\n  ".join(problems)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(model.lm, dict(state), adapter_name=ADAPTER)


# ---------------------------------------------------------------- a run's checkpoint


def split_trained_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict of an adapted model in two: the frozen weights under the library's keys, and what is trained."""
    frozen, trained = {}, {}
    for key, value in state.items():
        if any(part in key for part in (".lora_", f".modules_to_save.{ADAPTER}.", ".trainable_tokens_delta.")):
            trained[key] = value
            continue
        key = key.removeprefix(PEFT_PREFIX).replace(".token_adapter.base_layer.", ".")
        frozen[key.replace(".base_layer.", ".").replace(".original_module.", ".")] = value
    return frozen, trained


def load_trained_state(model: DiffusionLM, trained: Mapping[str, Tensor], source: str) -> None:
    """Loads the second part of ``split_trained_state`` in place.

    Raises: CheckpointError naming every tensor that is missing or unexpected.
    """
    _, own = split_trained_state(model.lm.state_dict())
    problems = [f"missing {key}" for key in own if key not in trained]
    problems += [f"unexpected {key}" for key in trained if key not in own]
    if problems:
        raise CheckpointError(f"{source} does not fit its own peft section: {'; '.join(problems)}.")
    model.lm.load_state_dict(dict(trained), strict=False)
