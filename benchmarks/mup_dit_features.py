"""Training steps with latents cached or encoded on the fly: what a sweep of narrow models costs.

    python -m benchmarks.mup_dit_features [--json FILE] [--rounds 5]

A DiT of width 288 (the paper's proxy: 4 heads of 72, here 4 of its 28 blocks) and a VAE of Stable Diffusion's layout
with an eighth of its channels, on 64 x 64 images. Both ways take the same rows; the cached one reads mean and standard
deviation from shards and samples the posterior, the other encodes the images. Times are medians of interleaved steps.
At full size the VAE has about 85 % of the work of such a step (specification 9.2), so that the ratio is larger there.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from common.parallel import Parallel
from mup_dit.array_dataset import ArrayDataset
from mup_dit.building import ModelConfig, build_model
from mup_dit.dit import DiTConfig
from mup_dit.encoders import LatentVAE
from mup_dit.extraction import Extractor
from mup_dit.feature_dataset import FeatureDataset
from mup_dit.objective import ObjectiveConfig
from mup_dit.task import DiffusionTask

IMAGES, SIDE, BATCH = 64, 64, 8
READ_ROWS = 256
MIN_RATIO = 1.2  # encoding has to cost more than reading


def tiny_vae() -> LatentVAE:
    """Stable Diffusion's layout (factor 8, 4 channels) with an eighth of its channels."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32, 64, 64), layers_per_block=2,
        norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return LatentVAE(vae, "tiny")


def build_task(encoder: LatentVAE | None) -> DiffusionTask:
    """The objective of the paper on 8 x 8 latents."""
    network = DiTConfig(depth=4, hidden_size=288, num_heads=4, input_size=SIDE // 8, num_classes=10)
    model = ModelConfig(network=network)
    return DiffusionTask(model, ObjectiveConfig(), seed=0, latent_scale=0.18215, encoder=encoder)


def measure(rounds: int = 5) -> dict[str, object]:
    """All figures; ``checks`` holds the claim with its threshold."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8, generator=rng)
    images = ArrayDataset(pixels, torch.randint(10, (IMAGES,), generator=rng))
    vae = tiny_vae()
    with tempfile.TemporaryDirectory() as folder:
        extractor = Extractor(images, size=SIDE, vae=vae, shard_rows=16, batch_size=16)
        extractor.run(Path(folder) / "features", Parallel(0, 1, 0, torch.device("cpu")))
        shard = extractor.plan()[0]
        extraction = statistics.median(timed(lambda: extractor.extract(shard)) for _ in range(rounds))
        cached = FeatureDataset(Path(folder) / "features")
        steps = {"cached": step(cached, build_task(None)), "on the fly": step(images, build_task(vae))}
        seconds = interleaved(steps, rounds)
        rows = np.random.default_rng(0).integers(0, IMAGES, READ_ROWS)
        reading = statistics.median(timed(lambda: cached.fetch(rows)) for _ in range(20))
        size = sum(path.stat().st_size for path in (Path(folder) / "features" / "shards").iterdir()) / IMAGES
    ratio = seconds["on the fly"] / seconds["cached"]
    return {
        "setting": f"DiT width 288, 4 blocks, 16 tokens, batch {BATCH}, images {SIDE} x {SIDE}, VAE an eighth as wide",
        "seconds per training step": {name: round(value, 4) for name, value in seconds.items()},
        "share of the VAE in a step on the fly": round(1 - 1 / ratio, 3),
        "extraction, images per second": round(len(shard.rows) / extraction),
        "reading, rows per second": round(READ_ROWS / reading),
        "bytes per image": round(size),
        "checks": [
            {
                "claim": "a step on cached latents against one that encodes its images",
                "measured": round(ratio, 2),
                "threshold": f">= {MIN_RATIO}",
                "passed": ratio >= MIN_RATIO,
            }
        ],
    }


def step(dataset: FeatureDataset | ArrayDataset, task: DiffusionTask) -> Callable[[], None]:
    """One optimizer step of a fresh model, data included."""
    model = build_model(task.model, torch.Generator().manual_seed(0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    state = {"step": 0}

    def run() -> None:
        rows = np.arange(BATCH) + BATCH * state["step"] % IMAGES
        loss = task.training_step(model, dataset.fetch(rows), task.draw(state["step"], BATCH)).loss_sum / BATCH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state["step"] += 1

    return run


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds, run in turns so that a busy machine slows all alike."""
    for run in candidates.values():
        run()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(timed(run))
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved steps of each kind")
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.rounds), indent=1)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
