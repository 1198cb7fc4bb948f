"""Converts a model between formats; any source that ``diffullama.loading.load_model`` accepts.

    python -m diffullama.export model_path=runs/first output=exported                 an ordinary Hugging Face folder
    python -m diffullama.export model_path=runs/first output=wrapper to=reference     the authors' key layout
    python -m diffullama.export model_path=runs/lora output=adapter to=adapter        the adapter alone
    python -m diffullama.export model_path=diffusionfamily/diffugpt-s output=imported dtype=auto

Adapters are merged into the weights, except for ``to=adapter``. A plain causal model becomes a diffusion model that is
not adapted yet, with ``mask_token_id=...`` or ``add_mask_token=true``; what ``objective=pt`` or ``sft`` trained stays
autoregressive without them.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from common import cli
from common.config import require_at_least, require_choice
from common.errors import ConfigError
from common.folders import write_folder
from common.seeding import generator
from diffullama.loading import LoadedModel, load_model, resolve_dtype
from diffullama.lora import NAMINGS, has_adapter, save_adapter
from diffullama.model import DiffusionLM
from diffullama.saving import check_output, model_card, model_metadata, save_model, write_metadata
from diffullama.special_tokens import add_mask_token, resolve_special_tokens

FORMATS = ("hf", "reference", "adapter")
CONFIG_DIR = "configs/diffullama"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of ``python -m diffullama.export``."""

    model_path: str  # run folder, model folder, adapter folder or hub name
    output: str  # folder to be written
    to: Literal["hf", "reference", "adapter"] = "hf"
    naming: Literal["peft", "reference"] = "peft"  # to=adapter: module names of the library or of the released wrapper
    base: str | None = None  # model below an adapter; null: the one its configuration names
    tokenizer: str | None = None  # name or folder; null: the model's own
    mask_token_id: int | None = None  # an existing id as the mask; null: the stored one
    add_mask_token: bool = False  # give a plain model a new token as the mask
    shift: bool | None = None  # null: as stored, or true
    seed: int = 0  # of the added token's embedding
    dtype: str | None = "auto"  # auto: as stored; bf16, fp16, fp32
    ema: bool = True  # the averaged weights, where a run has both
    strict: bool = True  # false: leave out weights that do not fit, with a warning
    max_shard_size: str = "5GB"  # larger weights are split over several files
    overwrite: bool = False  # replace a model that is there

    def __post_init__(self) -> None:
        require_choice("to", self.to, FORMATS)
        require_choice("naming", self.naming, NAMINGS)
        require_at_least("seed", self.seed, 0)
        for name in ("model_path", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give a path.")
        if self.add_mask_token and self.mask_token_id is not None:
            raise ConfigError(
                f"mask_token_id={self.mask_token_id} and add_mask_token=true contradict each other; leave one out."
            )
        if self.naming == "reference" and self.to != "adapter":
            raise ConfigError("naming=reference belongs to to=adapter; for whole models use to=reference.")
        resolve_dtype(self.dtype)


def main() -> int:
    """The command line."""
    return cli.run(export, "export", ExportConfig, CONFIG_DIR, print_config=False)


def export(config: ExportConfig) -> int:
    """Loads and writes; prints where."""
    output = Path(config.output)
    check_output(output, config.overwrite)
    loaded = load_model(
        config.model_path,
        dtype=config.dtype,
        base=config.base,
        tokenizer=config.tokenizer,
        mask_token_id=config.mask_token_id,
        shift=config.shift,
        causal_parent=True,
        ema=config.ema,
        strict=config.strict,
    )
    if config.add_mask_token:
        loaded = with_added_mask(loaded, config.seed)
    elif loaded.config.get("is_causal") is True and config.mask_token_id is None:
        model = DiffusionLM(loaded.model.lm, None, loaded.model.shift).eval()  # trained autoregressively: stays so
        loaded = replace(loaded, model=model)
    elif loaded.special.mask_id is None:
        resolve_special_tokens(loaded.tokenizer, loaded.model.config)  # says how to give it a mask
    metadata = {"base_model": config.model_path, **loaded.config}
    if config.to == "adapter":
        if not has_adapter(loaded.model):
            raise ConfigError(f"model_path={config.model_path} has no adapter; use to=hf or to=reference.")
        base = config.base or loaded.config.get("base_model")

        def write(folder: Path) -> None:
            save_adapter(folder, loaded.model, config.naming, base_model=base)
            known = model_metadata(loaded.model, loaded.special, metadata)
            write_metadata(folder, known)
            (folder / "README.md").write_text(model_card(loaded.model, known, "adapter"), encoding="utf-8")

        write_folder(output, write)
    else:
        save_model(
            output,
            loaded.model,
            loaded.tokenizer,
            loaded.special,
            metadata=metadata,
            overwrite=config.overwrite,
            layout=config.to,
            max_shard_size=config.max_shard_size,
        )
    print(output)
    return 0


def with_added_mask(loaded: LoadedModel, seed: int) -> LoadedModel:
    """A causal model with a mask token: the start of an adaptation.

    Raises: ConfigError if it has a mask already, or adapters.
    """
    if loaded.special.mask_id is not None:
        raise ConfigError(
            f"add_mask_token=true, but {loaded.source} has a mask already; give mask_token_id={loaded.special.mask_id}."
        )
    if has_adapter(loaded.model):
        raise ConfigError("add_mask_token=true does not work with adapters; add the token to the base model.")
    hf = loaded.model.hf
    mask_id = add_mask_token(hf, loaded.tokenizer, generator(seed, "mask row"))
    special = resolve_special_tokens(loaded.tokenizer, hf.config, mask_token_id=mask_id)
    model = DiffusionLM(hf, mask_id, loaded.model.shift).eval()
    return LoadedModel(model, loaded.tokenizer, special, {**loaded.config, "mask_token_id": mask_id}, loaded.source)


if __name__ == "__main__":
    sys.exit(main())
