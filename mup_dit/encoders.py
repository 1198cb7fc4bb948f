"""Frozen encoders: images to latents and back (a VAE), captions to features (T5, or a small one without a download).

Names are ``identity`` (VAE) and ``small`` (text), or a folder or hub name in the libraries' format.

Dimensions: B rows, C channels, S side of the latent, H, W rows and columns of pixels, T tokens, Y their channels.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.data.fingerprint import text_fingerprint
from common.errors import CheckpointError, ConfigError
from mup_dit.batches import TextEncoder
from mup_dit.small_text import SmallTextEncoder

SD_SCALE = 0.18215  # of latents of Stable Diffusion's VAE, where a configuration does not say
HUB_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
SAMPLED_VALUES = 16  # of every tensor, in a fingerprint
SMALL_TEXT_FILE = "small_text.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

logger = logging.getLogger(__name__)


class ImageEncoder(Protocol):
    """A VAE: posterior mean and standard deviation of latents, unscaled; ``scale`` makes their variance about one."""

    scale: float
    factor: int  # pixels per latent, along a side
    channels: int  # C
    name: str

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode(self, latent: Tensor) -> Tensor: ...


class IdentityVAE:
    """Images are their own latents: mean the image, standard deviation 0, scale 1."""

    scale, factor, name = 1.0, 1, "identity"

    def __init__(self, channels: int = 1) -> None:
        self.channels = channels

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image, torch.zeros_like(image)

    def decode(self, latent: Tensor) -> Tensor:
        return latent


class LatentVAE:
    """A ``diffusers.AutoencoderKL``, frozen.

    Args:
        vae: the library's model.
        scale: on latents; None: the configuration's ``scaling_factor``.
    """

    def __init__(self, vae: torch.nn.Module, name: str, scale: float | None = None) -> None:
        self.vae, self.name = vae.eval().requires_grad_(False), name
        config = vae.config
        self.scale = float(scale or getattr(config, "scaling_factor", None) or SD_SCALE)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels, self.image_channels = config.latent_channels, config.in_channels

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @torch.no_grad()
    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, 3, H, W)`` in [-1, 1] -> mean and standard deviation, float32, each ``(B, C, H/f, W/f)``."""
        posterior = self.vae.encode(image.to(self.device, self.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Latents as a network samples them, that is scaled -> images, float32, about [-1, 1]."""
        return self.vae.decode(latent.to(self.device, self.dtype) / self.scale).sample.float()

    def to(self, device: torch.device | str) -> "LatentVAE":
        self.vae.to(device)
        return self


def load_vae(
    name: str,
    device: torch.device | str = "cpu",
    *,
    dtype: str = "fp32",
    scale: float | None = None,
    channels: int = 1,
) -> ImageEncoder:
    """The image encoder called ``name``: ``identity``, ``ema`` or ``mse`` (Stable Diffusion's), a folder, a hub name.

    A pipeline's folder is accepted too; its part ``vae`` is read.

    Args:
        scale: of latents; None: the configuration's.
        channels: of ``identity``.

    Raises: CheckpointError if nothing can be loaded.
    """
    if name == "identity":
        return IdentityVAE(channels)
    from diffusers import AutoencoderKL

    where = HUB_VAES.get(name, name)
    folder = Path(where)
    part = {"subfolder": "vae"} if (folder / "vae" / "config.json").is_file() else {}
    try:
        vae = AutoencoderKL.from_pretrained(
            where,
            torch_dtype=_dtype(dtype),
            use_safetensors=_safetensors_only(folder / part.get("subfolder", "")),
            **part,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _not_loaded(
            "vae", name, error, "a folder with config.json and diffusion_pytorch_model.safetensors"
        ) from None
    return LatentVAE(vae.to(device), name, scale)


class T5TextEncoder:
    """A T5 encoder of transformers, frozen: the last hidden state of captions padded to T tokens.

    Args:
        length: T; longer captions are cut.
    """

    kind = "t5"
    pooled_channels = None

    def __init__(self, model: torch.nn.Module, tokenizer, name: str, length: int = 120) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.name, self.length, self.channels = name, length, model.config.d_model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``caption`` float32 (B, 1, T, Y) and ``mask`` int64 (B, T), on the encoder's device.

        ``pooled`` (B, Y) is the mean of the tokens that count: MMDiT needs one vector, and T5 has none of its own.
        """
        tokens = self.tokenizer(
            list(captions),
            max_length=self.length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).to(self.device)
        hidden_BTY = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mask_BT = tokens.attention_mask.to(torch.int64)
        hidden_BTY = hidden_BTY.float()
        counted_BT1 = mask_BT[..., None].float()
        pooled_BY = (hidden_BTY * counted_BT1).sum(dim=1) / counted_BT1.sum(dim=1).clamp(min=1)
        return {"caption": hidden_BTY[:, None], "mask": mask_BT, "pooled": pooled_BY}


def load_text_encoder(
    name: str, device: torch.device | str = "cpu", *, length: int | None = None, dtype: str = "fp32"
) -> TextEncoder:
    """The text encoder called ``name``: a folder that ``save_small_text`` wrote, or T5's folder or hub name.

    A pipeline's folder is accepted too; its parts ``text_encoder`` and ``tokenizer`` are read.

    Args:
        length: tokens per caption; None: 120, or the small encoder's own.

    Raises: CheckpointError if nothing can be loaded.
    """
    folder = Path(name)
    if (folder / SMALL_TEXT_FILE).is_file():
        return load_small_text(folder)
    if name == "small":
        raise ConfigError(
            "text=small is made from the captions of a data set, which this command has not; give the folder that "
            f"holds its {SMALL_TEXT_FILE}."
        )
    from transformers import AutoTokenizer, T5EncoderModel

    in_pipeline = (folder / "text_encoder" / "config.json").is_file()
    weights = folder / "text_encoder" if in_pipeline else folder
    try:
        model = T5EncoderModel.from_pretrained(
            name if not in_pipeline else str(weights), dtype=_dtype(dtype), use_safetensors=_safetensors_only(weights)
        )
        tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer") if in_pipeline else name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _not_loaded("text", name, error, "a folder with config.json, weights and tokenizer of a T5") from None
    return T5TextEncoder(model.to(device), tokenizer, name, length or 120)


def encoder_fingerprint(encoder: object | None) -> str:
    """Digest of an encoder: names, shapes and first values of its tensors; the description of a small one."""
    if encoder is None or isinstance(encoder, IdentityVAE):
        return type(encoder).__name__
    if isinstance(encoder, SmallTextEncoder):
        return text_fingerprint(*encoder.to_dict().items())
    network = encoder.vae if isinstance(encoder, LatentVAE) else encoder.model
    parts = [
        (name, tuple(value.shape), value.flatten()[:SAMPLED_VALUES].float().tolist())
        for name, value in network.state_dict().items()
    ]
    return text_fingerprint(*parts, getattr(encoder, "length", None))


def save_small_text(folder: Path | str, encoder: SmallTextEncoder) -> Path:
    """Writes what ``load_text_encoder`` reads again; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SMALL_TEXT_FILE).write_text(json.dumps(encoder.to_dict(), indent=1) + "\n", encoding="utf-8")
    return folder


def load_small_text(folder: Path | str) -> SmallTextEncoder:
    """Raises: CheckpointError if the description is missing or broken."""
    path = Path(folder) / SMALL_TEXT_FILE
    try:
        return SmallTextEncoder.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} describes no text encoder ({error}); make it again.") from None


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"dtype={name} is not known; choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _safetensors_only(folder: Path) -> bool | None:
    """Whether only safetensors may be read: where a folder has them. Else the libraries read ``weights_only``."""
    return True if any(folder.glob("*.safetensors")) else None


def _not_loaded(option: str, name: str, error: Exception, expected: str) -> CheckpointError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return CheckpointError(f"{option}={name} cannot be loaded ({lines[0][:200]}). Without hub access give {expected}.")
