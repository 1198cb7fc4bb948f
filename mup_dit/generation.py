"""Images from a trained model: its sampler, decoder and text encoder, and what is to be sampled.

Dimensions: B images, C channels, S side of the latent; H, W rows and columns of pixels.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from common.conversion import from_config
from common.errors import ConfigError
from common.parallel import Parallel
from common.precision import autocast_forward, resolve_precision
from mup_dit.aspect_ratios import TEST_TABLES, aspect_ratio_table
from mup_dit.batches import TextEncoder
from mup_dit.captions import SizedPrompt, clean_caption, parse_prompt
from mup_dit.encoders import load_text_encoder, load_vae
from mup_dit.generation_config import GenerateConfig
from mup_dit.image_files import to_uint8
from mup_dit.loading import LoadedModel, load_model
from mup_dit.objective import ObjectiveConfig
from mup_dit.requests import Request, plan_labels, plan_requests, read_prompts
from mup_dit.sample_folder import Generation, write_images
from mup_dit.sampling import LatentSampler, RowNoise, caption_condition, label_condition
from mup_dit.small_text import SmallTextEncoder

DEFAULT_SAMPLES = 16
PIXEL_CHANNELS = (1, 3)


class ImageSource:
    """uint8 images of requests, batch by batch.

    Args:
        decode: latents -> images in [-1, 1]; None: they are the images.
        rounding: see ``to_uint8``.
        factor: pixels per latent along a side.
        clean_captions: whether texts are cleaned before they are encoded.
    """

    def __init__(
        self,
        sampler: LatentSampler,
        seed: int,
        device: torch.device,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        text_encoder: TextEncoder | None = None,
        rounding: str = "truncate",
        factor: int = 1,
        clean_captions: bool = False,
    ) -> None:
        if decode is None and sampler.shape[0] not in PIXEL_CHANNELS:
            raise ConfigError(
                f"the model makes latents of {sampler.shape[0]} channels; give the autoencoder that decodes them, for "
                "example vae=stabilityai/sd-vae-ft-mse."
            )
        if sampler.family != "dit" and text_encoder is None:
            raise ConfigError(
                f"model.family={sampler.family} is conditioned on text; give the encoder that it was trained with, "
                "text_encoder=FOLDER."
            )
        self.sampler, self.seed, self.device = sampler, seed, device
        self.decode, self.text_encoder, self.rounding = decode, text_encoder, rounding
        self.factor, self.clean_captions = factor, clean_captions
        self.pixels = tuple(factor * side for side in sampler.shape[1:])
        self.own_side = factor * sampler.network.config.input_size

    @property
    def evaluations(self) -> int:
        """Network evaluations of an image."""
        return self.sampler.evaluations

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """``(H, W, C)`` of each; requests of one size are sampled together."""
        images: dict[int, np.ndarray] = {}
        for size in dict.fromkeys(request.size for request in requests):
            group = [request for request in requests if request.size == size]
            pixels = size or self.pixels
            shape = (self.sampler.shape[0], *(side // self.factor for side in pixels))
            noise = RowNoise(self.seed, [request.index for request in group], shape, self.device)
            latents = self.sampler(*self._conditions(group, pixels), noise)
            decoded = latents if self.decode is None else self.decode(latents)
            made = to_uint8(decoded.float(), self.rounding).cpu().numpy()
            images |= {request.index: image for request, image in zip(group, made, strict=True)}
        return [images[request.index] for request in requests]

    def _conditions(
        self, requests: Sequence[Request], pixels: tuple[int, int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        network = self.sampler.network
        if self.sampler.family == "dit":
            return label_condition(network, [request.label for request in requests], self.device)
        texts = [request.prompt for request in requests]
        unique = list(dict.fromkeys(texts))  # samples of a prompt share its features
        rows = torch.tensor([unique.index(text) for text in texts])
        encoded = self.text_encoder([clean_caption(text) for text in unique] if self.clean_captions else unique)
        part = {name: values[rows.to(values.device)].to(self.device) for name, values in encoded.items()}
        features = part["caption"], part["mask"], part.get("pooled")
        return caption_condition(network, self.sampler.family, *features, pixels=pixels)


def build_plan(config: GenerateConfig, source: ImageSource) -> tuple[list[Request], list[dict]]:
    """All requests, and of each prompt what its file says.

    Raises: ConfigError if the model's kind of condition is not what is given.
    """
    family, network = source.sampler.family, source.sampler.network.config
    suffix = f".{config.format}" if config.format in ("png", "jpg") else ".png"
    if family == "dit":
        if config.prompts is not None:
            raise ConfigError("model.family=dit is conditioned on classes; use labels= instead of prompts=.")
        labels = plan_labels(config.labels, config.num_samples or DEFAULT_SAMPLES, network.num_classes, config.seed)
        return plan_requests(labels=labels, suffix=suffix), []
    if config.prompts is None:
        raise ConfigError(f"model.family={family} is conditioned on text; give prompts=FILE or 'prompts=\"a text\"'.")
    prompts, details = read_prompts(config.prompts)
    parsed = [parse_prompt(prompt, _size_table(source)) for prompt in prompts]
    takes_sizes = getattr(network, "micro_conditions", False) and config.size is None
    requests = plan_requests(
        prompts=[each.text.strip() for each in parsed],
        sizes=[_bucket(each, source) for each in parsed] if takes_sizes else None,
        samples_per_prompt=config.samples_per_prompt,
        suffix=suffix,
        names=config.names,
        name_length=config.name_length,
        layout=config.layout,
    )
    if config.format == "npz" and len({request.size for request in requests}) > 1:
        raise ConfigError("prompts ask for several sizes (--ar), which one .npz cannot hold; use format=png.")
    if config.num_samples is not None and config.num_samples > len(requests):
        raise ConfigError(
            f"num_samples={config.num_samples}, but {len(prompts)} prompts give {len(requests)} images; raise "
            "samples_per_prompt."
        )
    return requests[: config.num_samples], details


def _size_table(source: ImageSource) -> Mapping[str, tuple[int, int]]:
    """Buckets around the model's own size; sizes without a table of their own have the square only."""
    side = source.own_side
    return aspect_ratio_table(side, test=True) if side in TEST_TABLES else {"1.0": (side, side)}


def _bucket(prompt: SizedPrompt, source: ImageSource) -> tuple[int, int] | None:
    """The size that the prompt's flags ask for; None for the model's own."""
    return None if prompt.bucket == (source.own_side, source.own_side) else prompt.bucket


def generate(config: GenerateConfig, parallel: Parallel | None = None) -> Generation:
    """Samples what ``config`` asks for; with several processes each takes every W-th block.

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair, before the first network call.
    """
    parallel = parallel or Parallel(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = torch.device(config.device) if config.device else parallel.device
    source = build_source(config, device)
    requests, details = build_plan(config, source)
    return write_images(config, source, requests, parallel, details=details)


def build_source(config: GenerateConfig, device: torch.device) -> ImageSource:
    """The model with its sampler, decoder and text encoder.

    Raises: CheckpointError for weights that cannot be loaded, ConfigError for options that do not fit the model.
    """
    loaded = load_model(
        config.model_path,
        device,
        use_ema=config.ema,
        heads=config.heads,
        base_shapes=config.base_shapes,
        output_mult=config.output_mult,
    )
    family = loaded.config.family
    network = _ready(loaded.model, config, device)
    vae_name = config.vae or loaded.metadata.get("vae")
    vae = None if vae_name in (None, "identity") else load_vae(vae_name, device)
    factor = 1 if vae is None else vae.factor
    sampler = LatentSampler(
        network,
        family,
        objective_of(loaded.metadata, family),
        config.sampling,
        weak=_weak(config, family, device),
        size=_latent_size(config, network, factor),
    )
    text_encoder = None if family == "dit" else _text_encoder(config, loaded, device)
    clean = config.clean_captions
    return ImageSource(
        sampler,
        config.seed,
        device,
        decode=None if vae is None else vae.decode,
        text_encoder=text_encoder,
        rounding=config.rounding if config.rounding != "auto" else "truncate" if family == "dit" else "nearest",
        factor=factor,
        clean_captions=getattr(text_encoder, "kind", None) == "t5" if clean is None else clean,
    )


def _weak(config: GenerateConfig, family: str, device: torch.device) -> nn.Module | None:
    if config.weak_model_path is None:
        return None
    loaded = load_model(config.weak_model_path, device, use_ema=config.ema)
    if loaded.config.family != family:
        raise ConfigError(f"weak_model_path={config.weak_model_path} is no {family} but a {loaded.config.family}.")
    return _ready(loaded.model, config, device)


def _latent_size(config: GenerateConfig, network: nn.Module, factor: int) -> tuple[int, int] | None:
    if config.size is None:
        return None
    if not getattr(network.config, "micro_conditions", False):
        raise ConfigError(
            f"size={config.size}: this model has one size, {factor * network.config.input_size} pixels a side; only "
            "PixArt-alpha with model.micro_conditions=true takes others."
        )
    unit = factor * network.config.patch_size
    if any(side % unit for side in config.size):
        raise ConfigError(f"size={config.size}: height and width must be divisible by {unit}, the side of a token.")
    return tuple(side // factor for side in config.size)


def objective_of(metadata: dict, family: str) -> ObjectiveConfig:
    """What the model was trained on; released checkpoints, which do not say, on the papers' objective."""
    saved = metadata.get("objective")
    if saved is not None:
        return from_config(ObjectiveConfig, saved, "objective")
    return ObjectiveConfig(kind="flow" if family == "mmdit" else "ddpm")


def _text_encoder(config: GenerateConfig, loaded: LoadedModel, device: torch.device) -> TextEncoder | None:
    """The one that is asked for, or the run's: a name, or the description of a small one."""
    text = config.text_encoder or loaded.metadata.get("text")
    if text is None:
        return None
    if isinstance(text, Mapping):
        return SmallTextEncoder.from_dict(text)
    return load_text_encoder(text, device, length=loaded.config.network.model_max_length)


def _ready(model: nn.Module, config: GenerateConfig, device: torch.device) -> nn.Module:
    model = model.to(device).eval().requires_grad_(False)
    autocast_forward(model, resolve_precision(config.precision, device), device)
    if config.compile:
        model.compile()
    return model
