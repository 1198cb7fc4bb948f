"""Weights of a folder, and their key names: the library's and the wrapper's of the released code, checked key by key.

Released checkpoints of DiffuGPT carry ``embed_tokens.*`` and ``denoise_model.*`` (the backbone without its embedding);
DiffuLLaMA is a plain ``LlamaForCausalLM``. Source: specification 3.3.
"""

import json
import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import CheckpointError, ConfigError

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that old files carry
WRAPPER_EMBEDDING, WRAPPER_BACKBONE = "embed_tokens.weight", "denoise_model."
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- files


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights in one of the hub's layouts."""
    return any((folder / name).is_file() for name in (*SINGLE_FILES, *INDEX_FILES))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder in the hub's format: safetensors rather than ``.bin``, in one file or in shards.

    Raises: CheckpointError naming the files that are missing or damaged, or that do not hold what the index says.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / index).is_file():
            return _read_shards(folder, index)
        if (folder / single).is_file():
            return read_file(folder / single)
    raise CheckpointError(
        f"{folder} holds no weights; {' or '.join(SINGLE_FILES)} (or shards with their index) needed."
    )


def _read_shards(folder: Path, index: str) -> dict[str, Tensor]:
    try:
        file_of: dict[str, str] = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(file_of.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / index} is no index of shards ({error!r}); copy it again.") from None
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{folder / index} points outside its folder ({outside[0]}); copy the repository again.")
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} weight files are missing ({', '.join(missing)}); copy them too."
        )
    state: dict[str, Tensor] = {}
    for name in shards:
        state |= read_file(folder / name)
    absent = [f"{key} (in {name})" for key, name in file_of.items() if key not in state]
    extra = [key for key in state if key not in file_of]
    if absent or extra:
        raise CheckpointError(
            f"{folder}: files and {index} disagree; copy them again. "
            + "; ".join([f"missing {key}" for key in absent] + [f"unlisted {key}" for key in extra])
        )
    return state


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one ``.safetensors`` or ``.bin`` file; nothing in it is executed.

    Raises: CheckpointError for a damaged file, or one that holds anything else.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                state = {name: file.get_tensor(name) for name in names}
                tied = json.loads((file.metadata() or {}).get("tied", "{}"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is no readable safetensors file ({error}); copy it again.") from None
        return state | {name: state[source] for name, source in tied.items()}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read without executing code ({str(error).splitlines()[0][:120]}); only tensors, numbers "
            "and containers are loaded. Use a safetensors file."
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} is damaged or no torch file ({lines[0][:120]}); copy it again.") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict (names with tensors); it is no weight file.")
    return dict(content)


# ---------------------------------------------------------------- key names


def embedding_key(hf: nn.Module) -> str:
    """The library's key of the token embedding, e.g. ``transformer.wte.weight``."""
    return f"{_name_of(hf, hf.get_input_embeddings())}.weight"


def head_key(hf: nn.Module) -> str:
    """The library's key of the head, ``lm_head.weight`` in most families."""
    return f"{_name_of(hf, hf.get_output_embeddings())}.weight"


def _name_of(hf: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in hf.named_modules() if module is wanted)


def is_tied(hf: nn.Module) -> bool:
    """Whether head and embedding are one tensor."""
    return hf.get_output_embeddings().weight is hf.get_input_embeddings().weight


def to_hf_keys(state: Mapping[str, Tensor], hf: nn.Module) -> dict[str, Tensor]:
    """``state`` under the keys of ``hf``.

    Takes wrapper keys, the library's own, those of a bare backbone (as in the hub's gpt2), and files that hold the
    wrapper's set twice, a second time under ``model.``.

    Raises: CheckpointError if the two copies of a tied matrix differ.
    """
    prefix, embedding, head = f"{hf.base_model_prefix}.", embedding_key(hf), head_key(hf)
    known = hf.state_dict().keys()
    found: dict[str, Tensor] = {}
    wrapped = any(key.startswith(WRAPPER_BACKBONE) for key in state)
    for key, value in state.items():
        if key.endswith(BUFFERS) and key not in known:
            continue
        if wrapped and key.startswith("model.") and key.removeprefix("model.") in state:
            continue  # the second set
        if key == WRAPPER_EMBEDDING and key not in known:
            key = embedding
        elif key.startswith(WRAPPER_BACKBONE):
            key = prefix + key.removeprefix(WRAPPER_BACKBONE)
        elif key not in known and prefix + key in known:
            key = prefix + key
        found[key] = value
    if is_tied(hf) and (embedding in found or head in found):
        if embedding in found and head in found and not torch.equal(found[embedding], found[head]):
            raise CheckpointError(
                f"{embedding} and {head} differ, but the configuration ties them; set tie_word_embeddings to false in "
                "its config.json, or drop the copy that is wrong."
            )
        found[embedding] = found[head] = found.get(embedding, found.get(head))
    return found


def differences(hf: nn.Module, found: Mapping[str, Tensor]) -> list[str]:
    """One line for every missing, unexpected or misshapen key of a state dict under the keys of ``hf``."""
    own = hf.state_dict()
    lines = [f"missing {key} {tuple(own[key].shape)}" for key in own if key not in found]
    lines += [f"unexpected {key} {tuple(found[key].shape)}" for key in found if key not in own]
    return lines + [
        f"{key} has shape {tuple(found[key].shape)}, the model's is {tuple(own[key].shape)}"
        for key in found
        if key in own and found[key].shape != own[key].shape
    ]


def fit_state(
    hf: nn.Module, state: Mapping[str, Tensor], *, source: str = "", strict: bool = True
) -> dict[str, Tensor]:
    """Weights of any naming as ``hf`` takes them; ``hf`` may be on the meta device.

    Args:
        source: where they come from, for messages.
        strict: False: what does not fit is left out with a warning that lists it.

    Raises: CheckpointError with every missing, unexpected or misshapen key.
    """
    found = to_hf_keys(state, hf)
    problems = differences(hf, found)
    if not problems:
        return found
    report = (
        f"{source or 'the checkpoint'} does not fit {type(hf).__name__} ({len(problems)} differences); check the model "
        "and its vocabulary size (strict=false loads what fits):\n  " + "\n  ".join(problems)
    )
    if strict:
        raise CheckpointError(report)
    logger.warning("%s", report)
    own = hf.state_dict()
    return {key: value for key, value in found.items() if key in own and value.shape == own[key].shape}


def load_strictly(hf: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads weights of any naming in place.

    Raises: CheckpointError with every missing, unexpected or misshapen key; nothing was loaded then.
    """
    hf.load_state_dict(fit_state(hf, state), strict=True)


def to_reference_keys(hf: nn.Module) -> dict[str, Tensor]:
    """The parameters under wrapper keys, embedding first; a tied matrix once, under ``embed_tokens.weight``.

    Raises: ConfigError for a model with adapters, which the layout has no keys for.
    """
    if any("lora_" in name or "modules_to_save" in name or "token_adapter" in name for name, _ in hf.named_modules()):
        raise ConfigError("the wrapper's layout has no keys for adapters; merge them first, or export to=adapter.")
    prefix, embedding, head = f"{hf.base_model_prefix}.", embedding_key(hf), head_key(hf)
    state = {WRAPPER_EMBEDDING: hf.get_input_embeddings().weight}
    for key, value in hf.state_dict(keep_vars=True).items():
        if key == embedding or (key == head and is_tied(hf)):
            continue
        state[f"{WRAPPER_BACKBONE}{key.removeprefix(prefix)}" if key.startswith(prefix) else key] = value
    return state
