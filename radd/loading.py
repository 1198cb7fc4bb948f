"""Models from and for disk: our runs and exports, released folders, the reference's checkpoints, the hub.

``load_model`` accepts

* a folder with ``model.safetensors`` and the nested ``config.json``: an export of ours, or a released model;
* a run folder or a checkpoint folder of ours (the newest complete checkpoint, moving average);
* the reference's run folder (``checkpoints-meta/checkpoint.pth`` and ``.hydra/config.yaml``) or one of its ``.pth``;
* a hub name such as ``JingyangOu/radd-lambda-dce``.

Pickled files are read with ``weights_only=True``, which executes nothing.
"""

import json
import logging
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import (
    CONFIG_FILE,
    MANIFEST,
    MODEL_FILE,
    checkpoints_dir,
    export_weights,
    list_checkpoints,
    load_weights,
    read_weights,
)
from common.data.corpora import load_data_tokenizer
from common.data.tokenizer import BYTE_CONFIG_FILE, Tokenizer
from common.diffusion.schedules import Schedule, build_schedule
from common.errors import CheckpointError, ConfigError, DataError
from common.evaluation.masked_model import MaskedLanguageModel
from common.precision import autocast_forward, resolve_precision
from radd.model import RADD, ModelConfig

REFERENCE_CHECKPOINT = Path("checkpoints-meta", "checkpoint.pth")
REFERENCE_CONFIG = Path(".hydra", "config.yaml")
REFERENCE_TOKENIZER = "gpt2"
COMPUTED = "rotary_emb.inv_freq"  # a buffer in every state dict, which no list of parameters holds
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB_FILES = [CONFIG_FILE, MODEL_FILE, "*tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]
TOKENIZER_FILES = (BYTE_CONFIG_FILE, "tokenizer.json", "vocab.json")

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model ready to be used, and what was stored with it. Unpacks as ``model, noise = load_model(path)``.

    Attributes:
        model: in eval mode, on the device asked for. Its ``config.dtype`` is None whatever the file says: the caller
            decides the precision; ``config`` keeps what was stored.
        schedule: of the noise it was trained with.
        config: the stored nested configuration.
        source: what was loaded, for reports.
        tokenizer_source: folder or name of its tokenizer.
    """

    model: RADD
    schedule: Schedule
    config: dict[str, Any]
    source: str = ""
    tokenizer_source: str | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.schedule))

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer the model was trained with; None, with a warning, if it cannot be loaded."""
        try:
            return self.load_tokenizer()
        except (ConfigError, DataError) as error:
            logger.warning("%s is used without its tokenizer: %s", self.source or "the model", error)
            return None

    def load_tokenizer(self) -> Tokenizer:
        """As ``tokenizer``, but an error if it cannot be loaded or has another vocabulary.

        Raises: DataError.
        """
        if self.tokenizer_source is None:
            raise DataError(f"{self.source or 'the model'} names no tokenizer; give one with tokenizer=....")
        data = self.config.get("data") or {}
        tokenizer = load_data_tokenizer(
            self.tokenizer_source,
            data.get("train", "embedded"),
            cache_dir=data.get("cache_dir"),
            detokenizer=data.get("detokenizer", "auto"),
            text_unit=data.get("text_unit"),
        )
        check_vocabulary(tokenizer, self.model.tokens, self.tokenizer_source)
        return tokenizer


def check_vocabulary(tokenizer: Tokenizer, tokens: int, name: str) -> None:
    """Raises DataError unless the tokenizer has exactly the model's tokens."""
    if tokenizer.vocab_size != tokens:
        raise DataError(
            f"the tokenizer {name} has {tokenizer.vocab_size} tokens, but the model {tokens}; give the one the model "
            "was trained with (tokenizer=...)."
        )


def load_model(path_or_hub_name: str | Path, device: torch.device | str = "cpu", *, ema: bool = True) -> LoadedModel:
    """The model stored under a path or hub name; see the module's list of what is accepted.

    Args:
        device: where the model goes.
        ema: the moving average of the weights, where both are stored.

    Raises: CheckpointError if nothing loadable is there, a file is damaged, or its tensors fit another model (all of
        them are named); ConfigError if the configuration lacks a required key.
    """
    state, config, source = _read(str(path_or_hub_name), ema)
    model = build_model(config)
    load_state(model, state, str(path_or_hub_name))
    return LoadedModel(
        model=model.eval().to(device),
        schedule=build_noise(config),
        config=config,
        source=str(path_or_hub_name),
        tokenizer_source=_tokenizer_source(source, config),
    )


def load_denoiser(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    ema: bool = True,
    precision: str = "fp32",
    tokenizer: str | None = None,
    length: int | None = None,
) -> MaskedLanguageModel:
    """The model as evaluators of any masked-token model take it (``--model_args loader=radd,pretrained=...``).

    Args:
        precision: auto, bf16, fp16 or fp32.
        tokenizer: name or folder; None: the model's own.
        length: longest sequence; None: the model's training length.
    Raises: as ``load_model``; DataError without a usable tokenizer.
    """
    loaded = load_model(path, device, ema=ema)
    model, device = loaded.model, torch.device(device)
    if tokenizer is not None:
        loaded.tokenizer_source = str(tokenizer)
    own = loaded.load_tokenizer()
    autocast_forward(model, resolve_precision(precision, device), device)
    return MaskedLanguageModel(
        denoise=lambda tokens_RL, where_RL: model(tokens_RL, where=where_RL),
        mask_id=model.mask_id,
        length=length or model.config.length,
        tokenizer=own,
        device=device,
        name=str(path),
    )


def build_model(config: Mapping[str, Any]) -> RADD:
    """A network of the proportions in a nested configuration (``tokens``, ``model.*``); unknown keys are ignored.

    Raises: ConfigError naming a required key that is missing or unusable.
    """
    for name in ("tokens", "model"):
        if config.get(name) is None:
            raise ConfigError(f"{name} is missing from the model's configuration; add it to {CONFIG_FILE}.")
    if not isinstance(config["model"], Mapping):
        raise ConfigError(f"model={config['model']!r} in the model's configuration is no group of options.")
    try:
        tokens, proportions = int(config["tokens"]), ModelConfig.from_mapping(config["model"])
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the model's configuration has an unusable value in tokens or model: {error}.") from None
    return RADD(replace(proportions, dtype=None), tokens)


def build_noise(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a nested configuration; log-linear, as everything released, where it says nothing."""
    known = ("type", "sigma_min", "sigma_max")
    return build_schedule(**{key: value for key, value in (config.get("noise") or {}).items() if key in known})


def load_state(model: RADD, state: Mapping[str, Tensor], source: str) -> None:
    """Copies a state dict into the model, in the model's own dtype.

    Raises: CheckpointError that names every tensor which is missing, unexpected or of another shape.
    """
    state = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in state.items()}
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state and name != COMPUTED]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    problems += [
        f"{name} is {_shape(state[name])} instead of {_shape(own[name])}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit a model of hidden_size={model.config.hidden_size}, "
            f"n_blocks={model.config.n_blocks}, n_heads={model.config.n_heads}, tokens={model.tokens}: "
            f"{'; '.join(problems)}. Weights and configuration "
            "belong to different models; put the right config.json beside the weights."
        )
    model.load_state_dict({name: state.get(name, own[name]) for name in own})


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


# ---------------------------------------------------------------- reading


def _read(name: str, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """State dict, nested configuration and the folder (or file) that they come from."""
    path = Path(name).expanduser()
    if path.is_file():
        return _read_file(path, ema)
    if path.is_dir():
        return _read_folder(path, ema)
    if not HUB_NAME.fullmatch(name) or name.startswith((".", "/", "~")) or path.suffix in (".pth", ".pt"):
        raise CheckpointError(
            f"model_path={name} does not exist; give a run folder, an exported folder, a .pth file or a hub name "
            "(owner/name)."
        )
    return _read_folder(_download(name), ema)


def _read_file(path: Path, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    if path.suffix == ".safetensors":
        return read_weights(path), _read_json(path.with_name(CONFIG_FILE)), path.parent
    if path.suffix not in (".pth", ".pt"):
        raise CheckpointError(f"model_path={path} is a {path.suffix or 'nameless'} file; .pth and .safetensors load.")
    state = read_reference_checkpoint(path, ema=ema)
    for config in (path.parents[1] / REFERENCE_CONFIG, path.parent / REFERENCE_CONFIG):
        if config.is_file():
            return state, _read_yaml(config), path.parent
    if path.with_name(CONFIG_FILE).is_file():
        return state, _read_json(path.with_name(CONFIG_FILE)), path.parent
    config = infer_config(state, str(path))
    logger.warning(
        "%s has no configuration beside it; proportions are read off its tensors, noise is taken as log-linear and "
        "length as %d.",
        path,
        config["model"]["length"],
    )
    return state, config, path.parent


def _read_folder(folder: Path, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    if (folder / REFERENCE_CHECKPOINT).is_file():
        return _read_file(folder / REFERENCE_CHECKPOINT, ema)
    if list_checkpoints(folder) or (folder / MANIFEST).is_file():
        return *load_weights(folder, ema=ema), folder
    if (folder / MODEL_FILE).is_file():
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"{folder} has {MODEL_FILE} but no {CONFIG_FILE}, so the model's shape is unknown.")
        return read_weights(folder / MODEL_FILE), _read_json(folder / CONFIG_FILE), folder
    if (folder / "export" / MODEL_FILE).is_file():
        return _read_folder(folder / "export", ema)
    numbered = checkpoints_dir(folder).glob("checkpoint_*.pth")
    newest = max(numbered, key=lambda path: int(re.sub(r"\D", "", path.stem) or 0), default=None)
    if newest is not None:
        return _read_file(newest, ema)
    present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"model_path={folder} holds no model: {MODEL_FILE} with {CONFIG_FILE}, checkpoints/ of a run, or "
        f"{REFERENCE_CHECKPOINT} is needed; it has {present}."
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"model_path={name} is no local folder and could not be fetched from the hub ({type(error).__name__}: "
            f"{lines[0][:160]}). Without hub access, copy the repository's {CONFIG_FILE} and {MODEL_FILE} into a "
            "folder and give that folder's path."
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the weights beside it need their configuration.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({error}); copy it again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}; the nested configuration is needed.")
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    """The reference's configuration; entries that refer to something which is not there are left out."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.load(path)
        found = {}
        for key in config:
            try:
                value = config[key]
                found[str(key)] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            except OmegaConfBaseException:
                continue  # e.g. work_dir, which the reference's own loader stumbles over
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is no readable configuration ({error}); copy it again.") from None
    return found


# ---------------------------------------------------------------- the reference's .pth


def read_reference_checkpoint(path: Path | str, *, ema: bool = True) -> dict[str, Tensor]:
    """The state dict of a ``.pth`` of the reference, with its moving average put in place.

    The file holds ``model`` (a state dict) and ``ema.shadow_params``, a list of the averaged parameters in the order of
    the state dict without the rotary buffer. A bare state dict is accepted too.

    Raises: CheckpointError for a damaged file, one that holds arbitrary objects, or a list that does not fit.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read without executing code ({str(error).splitlines()[0][:120]}); only tensors, numbers "
            "and containers are loaded. Save its state dict alone, or use the safetensors export."
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} is damaged or no torch file ({lines[0][:120]}); copy it again.") from None
    if isinstance(content, Mapping) and "vocab_embed.embedding" in content:
        return dict(content)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise CheckpointError(f"{path} has no entry 'model' with a state dict; it is no checkpoint of the reference.")
    state = {name.removeprefix("module."): value for name, value in content["model"].items()}
    if not ema:
        return state
    if not content.get("ema"):
        logger.warning("%s holds no moving average; its plain weights are used.", path)
        return state
    return state | _name_averages(content["ema"], state, str(path))


def _name_averages(ema: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    shadows: Sequence[Tensor] | None = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadows, Sequence):
        raise CheckpointError(f"{source}: its entry 'ema' has no list 'shadow_params'; load with ema=false.")
    names = [name for name in state if name != COMPUTED]
    if len(names) != len(shadows):
        raise CheckpointError(
            f"{source} has {len(shadows)} averaged tensors for {len(names)} parameters; load with ema=false."
        )
    wrong = [
        f"{name} is {_shape(state[name])}, its average {_shape(shadow)}"
        for name, shadow in zip(names, shadows, strict=True)
        if state[name].shape != shadow.shape
    ]
    if wrong:
        raise CheckpointError(f"{source}: the list of averages does not fit: {'; '.join(wrong)}; load with ema=false.")
    return dict(zip(names, shadows, strict=True))


def infer_config(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The nested configuration that a state dict's shapes imply; the rotary buffer tells the number of heads.

    Raises: CheckpointError if a tensor that is needed for it is missing.
    """
    try:
        columns, width = state["vocab_embed.embedding"].shape
        heads = width // (2 * len(state[COMPUTED]))
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source} has no configuration beside it, and its tensors do not tell the model's size ({error}); put the "
            f"run's {REFERENCE_CONFIG} or a {CONFIG_FILE} beside it."
        ) from None
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    model = {"hidden_size": width, "n_blocks": len(blocks), "n_heads": heads, "length": 1024}
    return {"tokens": columns - 1, "model": model, "noise": {"type": "loglinear"}}


# ---------------------------------------------------------------- tokenizers


def _tokenizer_source(source: Path, config: Mapping[str, Any]) -> str | None:
    """Where the tokenizer is: beside the weights, in the run's export or snapshots, or the configured name."""
    run = source.parents[1] if source.parent.name == "checkpoints" else source
    snapshots = sorted((run / "snapshots").glob("iter_*")) if (run / "snapshots").is_dir() else []
    for folder in (source, source / "tokenizer", run / "export", *snapshots[-1:]):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return str(folder)
    named = (config.get("data") or {}).get("tokenizer")
    if named:
        return str(named)
    return REFERENCE_TOKENIZER if config.get("tokens") == 50257 else None


# ---------------------------------------------------------------- writing


def reference_config(config: Mapping[str, Any], model: RADD, schedule: Schedule | None = None) -> dict[str, Any]:
    """A nested configuration that is complete for the reference's loader: ``config`` with what it lacks filled in.

    The proportions are the model's own; ``model.dtype`` and everything else stay as stored.
    """
    stored = config.get("model") or {}
    own = asdict(model.config) | {"dtype": stored.get("dtype")}
    noise = {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20.0} | dict(config.get("noise") or {})
    if schedule is not None and hasattr(schedule, "sigma_min"):
        noise = {"type": "geometric", "sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max}
    training = {"ema": 0.9999, "loss_type": "t_DCE", "weight": "standard"} | dict(config.get("training") or {})
    return {
        **config,
        "ngpus": config.get("ngpus") or 1,
        "tokens": model.tokens,
        "training": training,
        "noise": noise,
        "model": {**stored, **own},
    }


def save_reference_folder(
    folder: Path | str,
    model: RADD,
    config: Mapping[str, Any],
    *,
    schedule: Schedule | None = None,
    tokenizer: Tokenizer | None = None,
    model_card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes ``model.safetensors``, the nested ``config.json`` and a card: a folder that the reference loads, and we.

    A new folder appears complete or not at all.

    Args:
        config: nested, as ``LoadedModel.config``; see ``reference_config``.
        tokenizer: written beside the weights.
        overwrite: replace a model that is there, file by file.

    Raises: CheckpointError if a model is there already, or the disk is full.
    """
    folder = Path(folder)
    nested = reference_config(config, model, schedule)
    if (folder / MODEL_FILE).exists() and not overwrite:
        raise CheckpointError(
            f"output={folder} holds a model already; choose another folder, or replace it with overwrite=true."
        )

    def write(target: Path) -> None:
        if tokenizer is not None:
            tokenizer.save(target)  # first: it may bring a config or card of its own
        export_weights(target, model.state_dict(), nested, model_card or _card(nested))

    if folder.exists():
        write(folder)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"output={folder} cannot be made ({error.strerror}); choose another folder.") from None
    try:
        write(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _card(config: Mapping[str, Any]) -> str:
    model = config["model"]
    return (
        "---\nlicense: apache-2.0\npipeline_tag: text-generation\ntags: [diffusion, masked-diffusion, radd]\n---\n\n"
        f"Masked diffusion language model (RADD, arXiv 2406.03736): {model['n_blocks']} blocks of width "
        f"{model['hidden_size']}, {config['tokens']} tokens. Loads with `radd.loading.load_model(folder)` and with the "
        "reference's `load_model`.\n"
    )


def save_reference_checkpoint(
    path: Path | str,
    model_state: Mapping[str, Tensor],
    averages: Mapping[str, Tensor] | None = None,
    *,
    step: int = 0,
    decay: float = 0.9999,
    num_updates: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the reference's ``.pth``: ``model``, ``ema`` with its list in parameter order, ``step``; atomically.

    Args:
        model_state: under the published names.
        averages: moving averages by the same names; None: the weights themselves.
        step: optimizer steps done; num_updates: of the average, by default ``step``.

    Raises: CheckpointError if the file exists (unless ``overwrite``) or cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f"output={path} exists already; choose another name, or overwrite=true.")
    averages = model_state if averages is None else averages
    names = [name for name in model_state if name != COMPUTED]
    content = {
        "optimizer": {"state": {}, "param_groups": []},
        "model": {name: value.detach().cpu().contiguous() for name, value in model_state.items()},
        "ema": {
            "decay": decay,
            "num_updates": step if num_updates is None else num_updates,
            "shadow_params": [averages[name].detach().cpu().contiguous() for name in names],
        },
        "step": step,
    }
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"output={path} cannot be written ({error}); free disk space or choose another."
        ) from None
    return path


def save_reference_run(
    folder: Path | str, loaded: LoadedModel, plain: Mapping[str, Tensor] | None = None, *, overwrite: bool = False
) -> Path:
    """Writes a run folder of the reference: ``checkpoints-meta/checkpoint.pth`` and ``.hydra/config.yaml``.

    Args:
        loaded: its model holds the averaged weights.
        plain: weights without averaging; None: the averaged ones in both places.

    Raises: CheckpointError as ``save_reference_checkpoint``.
    """
    from omegaconf import OmegaConf

    folder = Path(folder)
    nested = reference_config(loaded.config, loaded.model, loaded.schedule)
    averages = loaded.model.state_dict()
    decay = nested["training"].get("ema")
    save_reference_checkpoint(
        folder / REFERENCE_CHECKPOINT,
        plain or averages,
        averages,
        step=int(nested["training"].get("n_iters", 0)),
        decay=0.9999 if decay is None else decay,
        overwrite=overwrite,
    )
    path = folder / REFERENCE_CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(json.loads(json.dumps(nested, default=str))), path)
    return folder
