"""Models to disk: an ordinary Hugging Face folder with metadata and a card, or the released wrapper's layout.

What makes it a diffusion model stands in ``quintet.json`` and, for other programs, in ``config.json``:
``mask_token_id``, ``diffusion_shift``, ``is_causal``.
"""

import contextlib
import copy
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import provenance
from common.checkpoint import CONFIG_FILE, save_weights, write_json
from common.config import require_choice
from common.data.tokenizer import Tokenizer
from common.folders import require_replaceable, write_folder
from diffullama.convert import has_weights
from diffullama.lora import ADAPTER_CONFIG, has_adapter, merge
from diffullama.model import DiffusionLM
from diffullama.special_tokens import SpecialTokens

METADATA_FILE = "quintet.json"
ARCHITECTURE_FOLDER = "architecture"  # of a run: configuration of the library's model and our metadata, no weights
LAYOUTS = ("hf", "reference")
DIFFUSION_OPTIONS = ("is_causal", "mask_token_id", "diffusion_shift", "special_tokens")  # of config.json
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's progress bars and its log of every file; warnings about our use of it stay silent too."""
    from transformers.utils import logging as library

    # saving imports DeepSpeed where it is installed, which warns unless it is told what there is
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


def model_metadata(model: DiffusionLM, special: SpecialTokens, metadata: Mapping[str, Any] | None = None) -> dict:
    """What ``quintet.json`` holds: how to run the model, then whatever else is known about it."""
    given = dict(metadata or {})
    return {
        "format": 1,
        **given,
        "mask_token_id": model.mask_id,
        "diffusion_shift": model.shift,
        "is_causal": model.mask_id is None,
        "special_tokens": special.to_dict(),
        "max_length": given.get("max_length") or model.max_length,
        **{key: given.get(key, value) for key, value in provenance.collect().items()},
    }


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes ``quintet.json``."""
    write_json(folder / METADATA_FILE, metadata)


def write_architecture(
    run_dir: Path | str,
    model: DiffusionLM,
    special: SpecialTokens,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes what ``load_model`` needs beside a run's checkpoints: configuration and metadata, no weights.

    Call it on the main process once the model is built, also when a run is resumed; the content is the same each time.
    """
    folder = Path(run_dir) / ARCHITECTURE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    known = model_metadata(model, special, metadata)
    write_json(folder / CONFIG_FILE, _described_config(model, known).to_dict())
    write_metadata(folder, known)
    return folder


def _described_config(model: DiffusionLM, metadata: Mapping[str, Any]) -> Any:
    """A copy of the library's configuration that says that and how the model is a diffusion model."""
    config = copy.deepcopy(model.config)
    config.vocab_size = model.vocab_size
    config.architectures = [type(model.hf).__name__]
    if model.mask_id is not None:
        config.mask_token_id, config.diffusion_shift = model.mask_id, model.shift
        config.is_causal = False  # transformers 5 then attends fully by itself; older versions ignore it
        config.special_tokens = dict(metadata["special_tokens"])
    else:  # trained on autoregressively from an adapted model, it must not be run with full attention
        for name in DIFFUSION_OPTIONS:
            vars(config).pop(name, None)
    return config


def save_model(
    folder: Path | str,
    model: DiffusionLM,
    tokenizer: Tokenizer | None,
    special: SpecialTokens,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    layout: str = "hf",
    max_shard_size: str = "5GB",
) -> Path:
    """Writes a Hugging Face folder: weights, configuration, tokenizer, ``quintet.json`` and a model card.

    The folder appears complete or not at all. Adapters are merged into a copy of the weights.

    Args:
        metadata: anything JSON-able that should travel with the model.
        overwrite: replace a model that is there.
        layout: ``hf``: ``AutoModelForCausalLM.from_pretrained`` loads it; ``reference``: the wrapper's keys, as the
            released DiffuGPT models have them.
        max_shard_size: weights beyond it are split over several files (layout hf).

    Raises: CheckpointError if a model is there already, or the disk is full.
    """
    folder = Path(folder)
    require_choice("layout", layout, LAYOUTS)
    check_output(folder, overwrite)
    if has_adapter(model):
        model = merge(copy.deepcopy(model))
    known = model_metadata(model, special, metadata)

    def write(target: Path) -> None:
        if tokenizer is not None:
            tokenizer.save(target)  # first: it may bring a configuration or card of its own
        config = _described_config(model, known)
        if layout == "reference":
            tasks = {"text-generation": {"do_sample": True, "max_length": known["max_length"]}}
            config.task_specific_params = {**(getattr(config, "task_specific_params", None) or {}), **tasks}
            save_weights(target / "model.safetensors", _on_cpu(model.reference_state_dict()))
            write_json(target / CONFIG_FILE, config.to_dict())
        else:
            own = model.hf.config
            try:
                model.hf.config = config
                with quiet_transformers():
                    model.hf.save_pretrained(str(target), max_shard_size=max_shard_size)
            finally:
                model.hf.config = own
        write_metadata(target, known)
        (target / "README.md").write_text(model_card(model, known, layout), encoding="utf-8")

    return write_folder(folder, write)


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu() for key, value in state.items()}


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises CheckpointError if ``folder`` holds something that must not be replaced."""
    require_replaceable(folder, overwrite, ours=has_weights(folder) or (folder / ADAPTER_CONFIG).is_file())


def model_card(model: DiffusionLM, metadata: Mapping[str, Any], layout: str) -> str:
    """Text of a folder's ``README.md``; ``layout`` is one of LAYOUTS, or ``adapter``."""
    config = model.config
    parent = metadata.get("base_model") or getattr(config, "name_or_path", None) or f"a {config.model_type} model"
    diffusion = model.mask_id is not None
    kind = "Masked diffusion" if diffusion else "Autoregressive"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if HUB_NAME.fullmatch(str(parent)):
        header.append(f"base_model: {parent}")
    header += ["tags: [diffusion, masked-diffusion, diffullama]" if diffusion else "tags: [causal-lm]", "---", ""]
    lines = [
        f"# {kind} language model ({config.model_type}, {parameters / 1e6:,.1f}M parameters)",
        "",
        f"From `{parent}`, adapted as in *Scaling Diffusion Language Models via Adaptation from Autoregressive Models* "
        "(arXiv 2410.17891)."
        if diffusion
        else f"From `{parent}`, trained autoregressively.",
        "",
    ]
    if diffusion:
        shift = "the hidden state before it" if model.shift else "its own hidden state"
        lines += [
            "| | |",
            "|---|---|",
            f"| mask token id | {model.mask_id} |",
            f"| shift | {str(model.shift).lower()}: a token is predicted by {shift} |",
            "| attention | full (`is_causal: false`); no time input |",
            f"| length | {metadata.get('max_length')} |",
            "",
        ]
    lines += [
        "```python",
        "from diffullama.loading import load_model",
        'loaded = load_model("path/of/this/folder")  # .model, .tokenizer, .special',
        "```",
        "",
    ]
    if layout == "hf" and diffusion:
        lines.append(
            "`transformers.AutoModelForCausalLM.from_pretrained` loads the weights too (version 5 with full attention; "
            "with older ones pass a 4D mask). `generate()` of that class is autoregressive and does not sample from "
            "this model.\n"
        )
    if layout == "adapter":
        lines.append("This folder holds a low-rank adapter; its base model is named in `adapter_config.json`.\n")
    if layout == "reference":
        lines.append("Keys are those of the authors' wrapper class (`embed_tokens`, `denoise_model`, tied head).\n")
    facts = {key: metadata[key] for key in ("git_revision", "seed", "step", "tokens_seen") if metadata.get(key)}
    if facts:
        lines.append("; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in facts.items()) + "\n")
    return "\n".join([*header, *lines])
