"""What a training run leaves behind at intervals: the model as it is, and a grid of samples."""

from collections.abc import Callable, Mapping

import torch
from PIL import Image
from torch import Tensor, nn

from common.seeding import derive_seed
from common.trainer import TrainState
from mup_dit.config import TrainConfig
from mup_dit.image_files import image_grid, to_image, to_uint8
from mup_dit.sampling import LatentSampler, RowNoise, SamplerConfig, caption_condition, label_condition
from mup_dit.saving import save_model

LATENT_RANGE = 3.0  # latents have unit variance; this much is shown


class Snapshots:
    """Hook of the trainer that writes, every ``training.snapshot_freq`` steps, into the run folder

    * ``snapshots/iter_{step}``: the averaged weights with config.json (not at the end, which has ``export/``);
    * ``samples/iter_{step}.png``, also at the end: one grid, always of the same noise and conditions.

    Args:
        examples: a batch whose conditions are sampled.
        decode: latents -> images in [-1, 1]; None: the latents are the images.
    """

    at_end = True

    def __init__(
        self, config: TrainConfig, examples: Mapping[str, Tensor], decode: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.config, self.examples, self.decode = config, examples, decode
        self.every_steps = config.training.snapshot_freq

    def __call__(self, state: TrainState) -> None:
        with state.eval_model() as model:
            if state.is_main and state.step < state.config.total_steps:
                folder = state.run_dir / "snapshots" / f"iter_{state.step}"
                save_model(folder, model, self.config.network, metadata={"step": state.step}, overwrite=True)
            if self.config.sampling.images and state.is_main:
                path = state.run_dir / "samples" / f"iter_{state.step}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                self.sample(model).save(path)

    @torch.no_grad()
    def sample(self, model: nn.Module) -> Image.Image:
        """The grid of the model as it is."""
        config, device = self.config, next(model.parameters()).device
        family, sampling = config.network.family, config.sampling
        options = SamplerConfig(steps=sampling.steps, cfg_scale=sampling.cfg_scale)
        sampler = LatentSampler(model, family, config.objective, options)
        rows = {name: value[: sampling.images].to(device) for name, value in self.examples.items()}
        count = len(next(iter(rows.values())))
        if family == "dit":
            condition, null = label_condition(model, rows["label"].tolist(), device)
        else:
            condition, null = caption_condition(model, family, rows["caption"], rows.get("mask"), rows.get("pooled"))
        noise = RowNoise(derive_seed(config.seed, "snapshot"), range(count), sampler.shape, device)
        latents = sampler(condition, null, noise)
        images = latents if self.decode is None else self.decode(latents)
        if images.shape[1] not in (1, 3):  # latents without their decoder: three channels as colours
            images = images[:, :3] / LATENT_RANGE
        return to_image(image_grid(to_uint8(images).cpu().numpy()))
