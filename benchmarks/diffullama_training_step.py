"""Training step of an adapted model: head and loss at masked positions in chunks and one [1, 1, L, L] mask, against
full logits and a [B, 1, L, L] mask.

    python -m benchmarks.diffullama_training_step
    python -m benchmarks.diffullama_training_step --full --device cuda
    python -m benchmarks.diffullama_training_step --repeats 3 --json runs/training_step.json

A GPT-2 in the proportions of the small one (12 layers, width 768, 50257 tokens): both the operations and the saved
activations of head and blocks relate as there. Times are medians of interleaved steps (forward, backward, clipping,
AdamW) of batches of 6 x 256 tokens; memory is the peak of one step with 32 x 512 tokens in a fresh process, above
parameters, gradients, optimizer states and imports. The other side is what the released trainer computes with the
library's model as it is: a float mask for every row, logits in float32 at every position. Ours is what
``diffullama.train`` runs, GPT-2's activation in one kernel (``diffullama/building.py``) included. Attention is half
open, both sides see the same masks, and must find the same loss. ``--full`` takes the small model itself (about 30 GB).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from common.seeding import generator
from diffullama.attention import annealed_allowed, to_additive
from diffullama.building import fuse_activations
from diffullama.losses import diffusion_loss, label_count
from diffullama.model import DiffusionLM
from diffullama.noise import add_noise, sample_time

VARIANTS = ("full-fp32", "ours-fp32", "full-bf16", "ours-bf16")
RATIO_OPEN = 0.5  # of the attention
CHECKS = (  # name, worse, better, what is compared, smallest ratio
    ("ours over full logits, fp32: time", "full-fp32", "ours-fp32", "seconds", 1.15),
    ("ours over full logits, bf16: time", "full-bf16", "ours-bf16", "seconds", 1.15),
    ("bf16 over fp32, ours: time", "ours-fp32", "ours-bf16", "seconds", 1.7),
    ("ours over full logits, fp32: memory", "full-fp32", "ours-fp32", "bytes", 2.0),
    ("ours over full logits, bf16: memory", "full-bf16", "ours-bf16", "bytes", 2.0),
)


@dataclass(frozen=True)
class Size:
    """A GPT-2 and the batches it is trained on."""

    layers: int
    width: int
    vocabulary: int
    batch: int
    length: int

    def __str__(self) -> str:
        model = f"{self.layers} layers, width {self.width}, {self.vocabulary} tokens"
        return f"{model}, batch {self.batch} x {self.length}"


TIMED = Size(4, 512, 11_167, 6, 256)
HELD = Size(3, 256, 4_187, 32, 512)
FULL = Size(12, 768, 50_257, 32, 512)


class Step:
    """One model with its optimizer; calling it makes one optimizer step."""

    def __init__(self, variant: str, size: Size, device: torch.device) -> None:
        kind, precision = variant.split("-")
        self.is_ours, self.bf16, self.size, self.device = kind == "ours", precision == "bf16", size, device
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=size.vocabulary,
            n_positions=size.length,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=max(1, size.width // 64),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
        self.model = DiffusionLM(GPT2LMHeadModel(config), mask_id=size.vocabulary - 1).to(device).train()
        if self.is_ours:
            fuse_activations(self.model.hf)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, weight_decay=0.0, fused=True)
        # One step on zero gradients puts the optimizer's states in memory.
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Clean and noised ids, masked positions, times in strata, open attention edges."""
        size = self.size
        shape = (size.batch, size.length)
        x_BL = torch.randint(0, size.vocabulary - 1, shape, generator=generator(0, "tokens", step))
        strata_B = (
            torch.arange(size.batch) + torch.rand(size.batch, generator=generator(0, "time", step))
        ) / size.batch
        t_B = sample_time(strata_B)
        z_BL, masked_BL = add_noise(
            x_BL, t_B, torch.rand(shape, generator=generator(0, "mask", step)), self.model.mask_id
        )
        u_LL = torch.rand(size.length, size.length, generator=generator(0, "edges", step))
        parts = (x_BL, z_BL, masked_BL, t_B, annealed_allowed(u_LL, RATIO_OPEN))
        return tuple(part.to(self.device) for part in parts)

    def loss_of(self, x_BL: Tensor, z_BL: Tensor, masked_BL: Tensor, t_B: Tensor, allowed_LL: Tensor) -> Tensor:
        labels = label_count(self.size.batch, self.size.length, shift=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            if self.is_ours:
                where_BL = masked_BL.clone()
                where_BL[:, 0] = False
                return self.model(z_BL, x_BL, where_BL, 1 / t_B, allowed=allowed_LL)[0] / labels
            dtype = torch.bfloat16 if self.bf16 else torch.float32
            mask_B1LL = to_additive(allowed_LL, dtype).expand(self.size.batch, 1, -1, -1).contiguous()
            logits_BLV = self.model.hf(input_ids=z_BL, attention_mask=mask_B1LL, use_cache=False).logits
            return diffusion_loss(
                logits_BLV, x_BL, z_BL, t_B, self.model.mask_id, shift=True, loss_norm="tokens", drawn_mask=masked_BL
            ).loss

    def __call__(self, *batch: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def measure_memory(variant: str, size: Size, device: torch.device) -> int:
    """Peak bytes of a step above what is there before it; run in a fresh process."""
    step = Step(variant, size, device)
    batch = step.batch(0)
    if device.type == "cuda":
        baseline = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(*batch)
        return torch.cuda.max_memory_allocated() - baseline
    baseline = resident_bytes("VmRSS")
    step(*batch)
    return resident_bytes("VmHWM") - baseline


def memory_in_fresh_process(variant: str, full: bool, threads: int, device: torch.device) -> int:
    command = [sys.executable, "-m", "benchmarks.diffullama_training_step", "--memory-of", variant]
    command += ["--threads", str(threads), "--device", str(device), *(["--full"] if full else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    if done.returncode:
        raise RuntimeError(f"{variant} needs more memory than there is, or failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def measure_times(size: Size, repeats: int, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a step, and the first loss, by variant; variants take turns on a machine that may be busy."""
    steps = {variant: Step(variant, size, device) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    losses: dict[str, float] = {}
    for repeat in range(-1, repeats):  # the first round warms up
        for variant, step in steps.items():
            batch = step.batch(repeat + 1)
            synchronize(device)
            started = time.perf_counter()
            loss = step(*batch)
            synchronize(device)
            if repeat < 0:
                losses[variant] = loss
            else:
                seconds[variant].append(time.perf_counter() - started)
    return {variant: statistics.median(values) for variant, values in seconds.items()}, losses


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(repeats: int = 5, *, full: bool = False, device: str | None = None, threads: int | None = None) -> dict:
    """Seconds and bytes by variant, the ratios with their targets, and agreement of the losses."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    timed, held = (FULL, FULL) if full else (TIMED, HELD)
    memory = {variant: memory_in_fresh_process(variant, full, threads, chosen) for variant in VARIANTS}
    seconds, losses = measure_times(timed, repeats, chosen)
    values: dict[str, Mapping[str, float]] = {"seconds": seconds, "bytes": memory}
    difference = abs(losses["full-fp32"] - losses["ours-fp32"]) / losses["full-fp32"]
    return {
        "setting": f"time: {timed}; memory: {held}; {chosen.type}, {threads} threads",
        "steps": {
            variant: {"seconds": seconds[variant], "MiB above the state": memory[variant] / 2**20}
            for variant in VARIANTS
        },
        "ratios": [
            {"name": name, "ratio": values[unit][worse] / values[unit][better], "target": target}
            for name, worse, better, unit, target in CHECKS
        ],
        "checks": [
            {
                "claim": "both sides find the same loss (fp32)",
                "measured": f"relative difference {difference:.1e}",
                "threshold": "<= 1e-5",
                "passed": difference <= 1e-5,
            }
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each variant")
    parser.add_argument("--full", action="store_true", help="GPT-2 small itself, batches of 32 x 512")
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
