"""Training step of RADD: head and loss at masked positions in chunks, against cross-entropy over all positions.

    python benchmarks/radd_training_step.py
    python benchmarks/radd_training_step.py --repeats 3 --vocabulary 5000 --json runs/training_step.json

Small proportions of the specification: width 384, 6 blocks, 256 tokens, 8 sequences, GPT-2's vocabulary. A step is
forward, backward, clipping and AdamW. Variants run interleaved and medians are compared. Memory is the peak resident
size of a fresh process minus its size with parameters, gradients and optimizer states in place.
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
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.diffusion.schedules import build_schedule
from common.seeding import generator
from radd.losses import Corruption, corrupt, draw_loss_inputs
from radd.model import RADD, ModelConfig

VARIANTS = ("dense-fp32", "masked-fp32", "dense-bf16", "masked-bf16")
CHECKS = (  # name, better, worse, what is compared, smallest ratio
    ("masked over dense, fp32: time", "dense-fp32", "masked-fp32", "seconds", 1.5),
    ("masked over dense, bf16: time", "dense-bf16", "masked-bf16", "seconds", 1.5),
    ("bf16 over fp32, masked: time", "masked-fp32", "masked-bf16", "seconds", 1.7),
    ("masked over dense, fp32: memory", "dense-fp32", "masked-fp32", "bytes", 2.0),
    ("masked over dense, bf16: memory", "dense-bf16", "masked-bf16", "bytes", 2.0),
)


class Step:
    """One model with its optimizer; calling it with a batch makes one optimizer step."""

    def __init__(self, variant: str, options: argparse.Namespace) -> None:
        self.loss, precision = variant.split("-")
        self.bf16 = precision == "bf16"
        self.device = torch.device(options.device)
        torch.manual_seed(0)
        config = ModelConfig(
            hidden_size=options.width,
            n_blocks=options.blocks,
            n_heads=max(1, options.width // 64),
            length=options.length,
            dropout=0.0,
        )
        self.model = RADD(config, options.vocabulary).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, weight_decay=0.0, fused=True)
        # One step on zero gradients puts the optimizer's states in memory.
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def batch(self, step: int, options: argparse.Namespace) -> tuple[torch.Tensor, Corruption]:
        """Random tokens masked by lambda_DCE's rule, strata over the batch: half of all positions on average."""
        shape = (options.batch, options.length)
        x_BL = torch.randint(0, options.vocabulary, shape, generator=generator(0, "tokens", step))
        draws = draw_loss_inputs(
            "lambda_DCE", *shape, generator_for=lambda purpose: generator(0, purpose, step), sampler="stratified"
        )
        draws = {name: draw.to(self.device) for name, draw in draws.items()}
        x_BL = x_BL.to(self.device)
        return x_BL, corrupt("lambda_DCE", x_BL, draws, build_schedule(), mask_id=options.vocabulary)

    def loss_of(self, x_BL: torch.Tensor, state: Corruption) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            if self.loss == "masked":
                return self.model(state.z_BL, x_BL, state.where_BL, state.weight_B)[0] / x_BL.numel()
            logits_BLV = self.model.logits(state.z_BL)
            nll_BL = F.cross_entropy(logits_BLV.flatten(0, 1), x_BL.flatten(), reduction="none").view_as(x_BL)
            return (nll_BL * state.where_BL * state.weight_B[:, None]).sum() / x_BL.numel()

    def __call__(self, x_BL: torch.Tensor, state: Corruption) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(x_BL, state)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process.

    Not getrusage's maximum: Linux carries the parent's peak into the child through fork and exec.
    """
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def measure_memory(variant: str, options: argparse.Namespace) -> int:
    """Peak bytes of two steps above parameters, gradients, optimizer states and imports; run in a fresh process."""
    step = Step(variant, options)
    batches = [step.batch(index, options) for index in range(2)]
    if step.device.type == "cuda":
        baseline = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for batch in batches:
            step(*batch)
        return torch.cuda.max_memory_allocated() - baseline
    baseline = resident_bytes("VmRSS")
    for batch in batches:
        step(*batch)
    return resident_bytes("VmHWM") - baseline


def measure_times(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step by variant; variants take turns so that a busy machine disturbs all alike."""
    steps = {variant: Step(variant, options) for variant in options.variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for repeat in range(-1, options.repeats):  # the first round warms up
        for variant, step in steps.items():
            batch = step.batch(repeat, options)
            synchronize(step.device)
            start = time.perf_counter()
            step(*batch)
            synchronize(step.device)
            if repeat >= 0:
                seconds[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(values) for variant, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_in_fresh_process(variant: str, arguments: list[str]) -> int:
    command = [sys.executable, __file__, *arguments, "--memory-of", variant]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--repeats", type=int, default=9, help="measured steps of each variant")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, arguments: list[str]) -> dict:
    """Seconds and bytes by variant, and the ratios with their targets."""
    seconds = measure_times(options)
    memory = {variant: memory_in_fresh_process(variant, arguments) for variant in options.variants}
    values = {"seconds": seconds, "bytes": memory}
    ratios = [
        {"name": name, "ratio": values[unit][worse] / values[unit][better], "target": target}
        for name, worse, better, unit, target in CHECKS
        if worse in options.variants and better in options.variants
    ]
    return {"benchmark": "radd_training_step", **values, "ratios": ratios}


def main(arguments: list[str] | None = None) -> dict | None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(measure_memory(options.memory_of, options))
        return None
    result = measure(options, arguments)
    for variant in options.variants:
        print(f"{variant:12s} {result['seconds'][variant]:8.3f} s/step {result['bytes'][variant] / 2**20:8.0f} MiB")
    for ratio in result["ratios"]:
        verdict = "PASS" if ratio["ratio"] >= ratio["target"] else "FAIL"
        print(f"{ratio['name']:34s} {ratio['ratio']:5.2f}x (target {ratio['target']}x) {verdict}")
    print(json.dumps(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
