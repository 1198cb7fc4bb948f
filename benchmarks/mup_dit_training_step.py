"""Training step of DiT-S/2 at 256 tokens and batch 8, against diffusers' DiTTransformer2DModel of equal size.

    python -m benchmarks.mup_dit_training_step
    python -m benchmarks.mup_dit_training_step --repeats 3 --device cuda --batch 64

12 layers, width 384, 6 heads, patch 2, latents of 4 x 32 x 32. Times are medians of interleaved steps (forward,
diffusion loss with learnt variance, backward, AdamW); memory is the peak of one step in a fresh process, above
parameters, gradients, optimizer states and imports. Both sides have the same loss, batches and optimizer; diffusers'
network holds a time and label embedding in every block, ours one for all blocks. "Default" is the precision that
``precision=auto`` chooses on this machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from benchmarks.diffullama_training_step import resident_bytes
from common.diffusion.gaussian import build_diffusion
from common.precision import autocast, resolve_precision
from common.seeding import generator
from mup_dit.building import ModelConfig, build_model
from mup_dit.dit import DiTConfig
from mup_dit.optimizer_groups import mup_groups

VARIANTS = ("diffusers-fp32", "ours-fp32", "diffusers-default", "ours-default")
RATIOS = (  # name, worse, better, what is compared, smallest ratio
    ("throughput of ours over diffusers, fp32", "diffusers-fp32", "ours-fp32", "seconds", 0.97),
    ("throughput of ours over diffusers, default precision", "diffusers-default", "ours-default", "seconds", 0.97),
    ("ours in default precision over diffusers in fp32: throughput", "diffusers-fp32", "ours-default", "seconds", 2.0),
    ("memory of diffusers over ours, fp32", "diffusers-fp32", "ours-fp32", "bytes", 1 / 1.05),
    ("memory of diffusers over ours, default precision", "diffusers-default", "ours-default", "bytes", 1 / 1.05),
)
DEPTH, WIDTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES = 12, 384, 6, 2, 32, 4, 1000
BATCH = 8


class Step:
    """One network with its optimizer; calling it makes one optimizer step."""

    def __init__(self, variant: str, device: torch.device, batch: int) -> None:
        kind, precision = variant.split("-")
        self.is_ours, self.device, self.batch_size = kind == "ours", device, batch
        self.precision = resolve_precision("auto", device, "none") if precision == "default" else "fp32"
        torch.manual_seed(0)
        self.model = (build_ours() if self.is_ours else build_theirs()).to(device).train()
        self.diffusion = build_diffusion()
        groups = mup_groups(self.model.named_parameters(), getattr(self.model, "scalings", None), 0.0)
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for p in group["params"] if p.requires_grad]} for group in groups if group["params"]],
            lr=1e-4,
            weight_decay=0.0,
            fused=True,
        )
        # one step on zero gradients puts the optimizer's states in memory
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, noise, times, labels."""
        rng = generator(0, "batch", step)
        shape = (self.batch_size, CHANNELS, SIDE, SIDE)
        x0, noise = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
        t_B = torch.randint(1000, (self.batch_size,), generator=rng)
        y_B = torch.randint(CLASSES, (self.batch_size,), generator=rng)
        return tuple(part.to(self.device) for part in (x0, noise, t_B, y_B))

    def __call__(self, x0: Tensor, noise: Tensor, t_B: Tensor, y_B: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        x_t = self.diffusion.q_sample(x0, t_B, noise)
        with autocast(self.precision, self.device):
            out = self.model(x_t, t_B, y_B) if self.is_ours else self.model(x_t, t_B, y_B, return_dict=False)[0]
        loss = self.diffusion.training_losses(out.float(), x0, x_t, t_B, noise)["loss"].mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def build_ours() -> nn.Module:
    network = DiTConfig(
        depth=DEPTH,
        hidden_size=WIDTH,
        num_heads=HEADS,
        patch_size=PATCH,
        input_size=SIDE,
        in_channels=CHANNELS,
        num_classes=CLASSES,
    )
    return build_model(ModelConfig(parametrization="mup", network=network))


def build_theirs() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=DEPTH,
        sample_size=SIDE,
        patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
    )


def measure_memory(variant: str, device: torch.device, batch: int) -> int:
    """Peak bytes of a step above what is there before it; run in a fresh process."""
    step = Step(variant, device, batch)
    parts = step.batch(0)
    if device.type == "cuda":
        baseline = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(*parts)
        return torch.cuda.max_memory_allocated() - baseline
    baseline = resident_bytes("VmRSS")
    step(*parts)
    return resident_bytes("VmHWM") - baseline


def memory_in_fresh_process(variant: str, device: torch.device, batch: int, threads: int) -> int:
    command = [sys.executable, "-m", "benchmarks.mup_dit_training_step", "--memory-of", variant]
    command += ["--device", str(device), "--batch", str(batch), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    if done.returncode:
        raise RuntimeError(f"{variant} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def measure_times(repeats: int, device: torch.device, batch: int) -> dict[str, float]:
    """Median seconds of a step by variant; variants take turns on a machine that may be busy."""
    steps = {variant: Step(variant, device, batch) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for repeat in range(-2, repeats):  # the first rounds warm up
        for variant, step in steps.items():
            parts = step.batch(repeat + 2)
            started = time.perf_counter()
            step(*parts)  # ends with .item(), so the device is done
            if repeat >= 0:
                seconds[variant].append(time.perf_counter() - started)
    return {variant: statistics.median(values) for variant, values in seconds.items()}


def measure(repeats: int = 9, *, device: str | None = None, batch: int = BATCH, threads: int | None = None) -> dict:
    """Seconds and bytes by variant, and the ratios with their targets."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    held = {variant: memory_in_fresh_process(variant, chosen, batch, threads) for variant in VARIANTS}
    seconds = measure_times(repeats, chosen, batch)
    values = {"seconds": seconds, "bytes": held}
    counts = {"ours": build_ours(), "diffusers": build_theirs()}
    default = resolve_precision("auto", chosen, "none")
    return {
        "setting": f"DiT-S/2, 256 tokens, batch {batch}; {chosen.type}, {threads} threads; default precision {default}",
        "trainable parameters": {
            name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in counts.items()
        },
        "steps": {
            variant: {
                "seconds": seconds[variant],
                "images per second": batch / seconds[variant],
                "MiB above the state": held[variant] / 2**20,
            }
            for variant in VARIANTS
        },
        "ratios": [
            {"name": name, "ratio": values[unit][worse] / values[unit][better], "target": target}
            for name, worse, better, unit, target in RATIOS
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="measured steps of each variant")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        torch.set_num_threads(options.threads or os.cpu_count() or 1)
        print(measure_memory(options.memory_of, torch.device(options.device or "cpu"), options.batch))
        return
    result = measure(options.repeats, device=options.device, batch=options.batch, threads=options.threads)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
