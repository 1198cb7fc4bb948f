"""Guided sampling of a DiT against the loop of diffusers' DiT pipeline, at equal weights, steps and noise.

    python -m benchmarks.mup_dit_sampling [--json FILE] [--repeats 3] [--full]

Proportions of DiT-S/2 (width 384, 6 heads, 256 tokens; 12 layers with ``--full``, else 4), DDIM, guidance 1.5 on all
channels, latents decoded by a tiny autoencoder. Both sides get the same noise and must make the same images. Times are
medians of interleaved runs; memory is the peak of a run in a fresh process, above what is there when it begins.
``default`` is ``precision=auto``: bfloat16 by autocast where the hardware multiplies it, else float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import Tensor

from common.precision import autocast_forward, resolve_precision
from common.seeding import generator
from mup_dit.building import ModelConfig, build_model
from mup_dit.conversion import dit_to_diffusers, match_frequencies
from mup_dit.dit import DiT, DiTConfig
from mup_dit.objective import ObjectiveConfig
from mup_dit.sampling import LatentSampler, RowNoise, SamplerConfig, label_condition

MEMORY_RUNS = 5
VARIANTS = ("diffusers-fp32", "ours-fp32", "ours-default")
CFG_SCALE = 1.5
LATENT_SCALE = 0.18215
SPEED, MEMORY, DEFAULT_SPEED = 0.97, 1.05, 1.8


@dataclass(frozen=True)
class Size:
    depth: int
    images: int  # twice as many rows under guidance
    steps: int

    def __str__(self) -> str:
        return f"{self.depth} layers, width 384, 256 tokens, {self.images} images, {self.steps} steps"


TIMED = Size(4, 2, 5)
HELD = Size(4, 16, 2)
FULL = Size(12, 8, 50)


def build_pipeline(size: Size, device: torch.device) -> tuple[DiT, DiTPipeline]:
    """The network as ours and inside diffusers' pipeline, with the original's frequencies."""
    rng = torch.Generator().manual_seed(0)
    network = DiTConfig(depth=size.depth, hidden_size=384, num_heads=6)
    ours = build_model(ModelConfig(parametrization="sp", network=network), rng)
    with torch.no_grad():  # zero gates and readout would hide the blocks
        for parameter in ours.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(0.0, 0.02, generator=rng)
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=LATENT_SCALE).eval()
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    pipeline = DiTPipeline(match_frequencies(dit_to_diffusers(ours)), vae, scheduler).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return ours.eval().requires_grad_(False).to(device), pipeline


class Run:
    """Samples the images of one variant; returns them in [0, 1], ``(B, 3, H, W)`` on the CPU."""

    def __init__(self, variant: str, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.labels = list(range(size.images))
        self.ours, self.pipeline = build_pipeline(size, device)
        self.is_ours = variant.startswith("ours")
        if self.is_ours:
            self.precision = resolve_precision("auto", device) if variant.endswith("default") else "fp32"
            autocast_forward(self.ours, self.precision, device)
            self.pipeline.transformer = None
            options = SamplerConfig(
                sampler="ddim", respacing=f"ddim{size.steps}", cfg_scale=CFG_SCALE, cfg_channels="all"
            )
            self.sampler = LatentSampler(self.ours, "dit", ObjectiveConfig(), options)
        else:
            self.ours = None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        if not self.is_ours:
            generators = [generator(0, "sample", index) for index in range(self.size.images)]
            images = self.pipeline(
                self.labels, guidance_scale=CFG_SCALE, num_inference_steps=self.size.steps, generator=generators,
                output_type="pt",
            ).images  # fmt: skip
            return images.cpu()
        noise = RowNoise(0, range(self.size.images), self.sampler.shape, self.device)
        latents = self.sampler(*label_condition(self.ours, self.labels, self.device), noise)
        images = self.pipeline.vae.decode(latents / LATENT_SCALE).sample
        return (images / 2 + 0.5).clamp(0, 1).cpu()


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def measure_memory(variant: str, size: Size, device: torch.device) -> int:
    """Peak bytes of a run above what is there before it; in a fresh process."""
    run = Run(variant, size, device)
    if device.type == "cuda":
        run()
        baseline = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - baseline
    baseline = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - baseline


def memory_in_fresh_process(variant: str, full: bool, threads: int, device: torch.device) -> int:
    command = [sys.executable, "-m", "benchmarks.mup_dit_sampling", "--memory-of", variant]
    command += ["--threads", str(threads), "--device", str(device), *(["--full"] if full else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    if done.returncode:
        raise RuntimeError(f"{variant} needs more memory than there is, or failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def measure_times(size: Size, repeats: int, device: torch.device) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds and the images of each variant; variants take turns on a machine that may be busy."""
    runs = {variant: Run(variant, size, device) for variant in VARIANTS}
    images = {variant: run() for variant, run in runs.items()}  # warm up
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(repeats):
        for variant, run in runs.items():
            started = time.perf_counter()
            run()  # ends with images on the CPU, so nothing is still under way
            seconds[variant].append(time.perf_counter() - started)
    return {variant: statistics.median(values) for variant, values in seconds.items()}, images


def measure(repeats: int = 3, *, full: bool = False, device: str | None = None, threads: int | None = None) -> dict:
    """Seconds and bytes by variant, ratios with their targets, and agreement of the images."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    timed, held = (FULL, FULL) if full else (TIMED, HELD)
    # what the allocator holds back differs from process to process: the median of several
    memory = {
        variant: statistics.median(memory_in_fresh_process(variant, full, threads, chosen) for _ in range(MEMORY_RUNS))
        for variant in VARIANTS
    }
    seconds, images = measure_times(timed, repeats, chosen)
    theirs, same, default = VARIANTS
    difference = float((images[theirs] - images[same]).abs().max())
    precision = resolve_precision("auto", chosen)
    return {
        "setting": f"time: {timed}; memory: {held}; {chosen.type}, {threads} threads; default precision {precision}",
        "sampling": {
            variant: {"seconds": seconds[variant], "MiB above the weights": memory[variant] / 2**20}
            for variant in VARIANTS
        },
        "ratios": [
            {"name": "speed, ours over diffusers, fp32", "ratio": seconds[theirs] / seconds[same], "target": SPEED},
            {"name": "speed, our default over diffusers' fp32", "ratio": seconds[theirs] / seconds[default],
             "target": DEFAULT_SPEED},
            {"name": "memory, diffusers over ours, fp32", "ratio": memory[theirs] / memory[same],
             "target": round(1 / MEMORY, 3)},
        ],
        "checks": [
            {
                "claim": "both sides make the same images (fp32)",
                "measured": f"largest difference {difference:.1e} of 1",
                "threshold": "<= 1e-3",
                "passed": difference <= 1e-3,
            }
        ],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each variant")
    parser.add_argument("--full", action="store_true", help="DiT-S/2 itself, 8 images, 50 steps")
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        torch.set_num_threads(options.threads or 1)
        size = FULL if options.full else HELD
        print(measure_memory(options.memory_of, size, torch.device(options.device or "cpu")))
        return
    result = measure(options.repeats, full=options.full, device=options.device, threads=options.threads)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
