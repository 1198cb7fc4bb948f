"""A training step of the generator: one run of the stack per distinct state against one per network of the batch.

    python -m benchmarks.rpg_training_step [--json FILE] [--repeats 5]

The released scheme runs the recurrent stack for all tokens of all 8 networks of a batch and trains on 512 of them; ours
(``training.stacking=shared``) runs it once for the state that the networks share and trains on as many tokens. Both are
the same code with another option, both make a whole optimizer step (forward, backward, AdamW). Width and values per
token are 1024, networks have 512 tokens; two denoisers: the small one of our examples, and the paper's, whose
convolutions weigh more the narrower the stack is. "Loss" is the mean over the last 150 of 450 steps on checkpoints of
small digit classifiers, three seeds each.
"""

import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.command import main
from benchmarks.processes import interleaved
from common.config import BatchConfig, OptimConfig, TrackingConfig, TrainerConfig
from common.data.loader import build_train_loader
from common.tracking import read_records
from common.trainer import fit
from rpg.codec import TokenCodec
from rpg.model import build_generator
from rpg.model_config import GeneratorConfig
from rpg.sources import find_sources
from rpg.structure import compute_structure
from rpg.task import GeneratorTask
from rpg.training import NetworkNumbers
from rpg.zoo.digits import DigitRecipe, train_network

WIDTH, TOKENS, BATCH, ROWS = 1024, 512, 8, 512
SMALL, PAPER = (1, 16, 32, 16, 1), (1, 32, 64, 128, 64, 32, 1)
SPEED, SIGMAS = 2.0, 3.0
STEPS, LAST, SEEDS = 450, 150, 3


class RandomTokens:
    """Tokens of networks that nobody trained."""

    def gather(self, network_R: torch.Tensor, token_R: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(network_R), WIDTH, generator=torch.Generator().manual_seed(0))


def build_step(channels: tuple[int, ...], *, shared: bool, rows: int = ROWS) -> Callable[[], None]:
    """One optimizer step of the scheme."""
    config = GeneratorConfig(
        num_tokens=TOKENS, dim_per_token=WIDTH, d_model=WIDTH, num_states=1, channels=channels, positions="1d"
    )
    batch = 1 if shared else BATCH
    codec = TokenCodec(_structure(), WIDTH)
    torch.manual_seed(0)
    model = build_generator(config, codec)
    task = GeneratorTask(
        config, build=lambda: model, tokens=RandomTokens(),
        sources=find_sources(torch.zeros(BATCH, dtype=torch.int64), None, use_states=True),
        valid_L=codec.valid_L, seed=0, tokens_per_network=rows // batch, shared=shared,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    numbers = iter(range(10**9))

    def step() -> None:
        draws = task.draw(next(numbers), batch)
        output = task.training_step(model, {"network": torch.arange(batch)}, draws)
        (output.loss_sum / task.count({}, draws)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _structure():
    from rpg.structure import structure_of_shapes

    return structure_of_shapes({"weight": torch.empty(TOKENS * WIDTH, device="meta")})


def train_losses(folder: Path, *, shared: bool, seed: int, states: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss of the last steps of a short training on real checkpoints."""
    codec = TokenCodec(compute_structure(states), 128)
    tokens_KLD = torch.stack([codec.encode(state) for state in states])

    class Tokens:
        def gather(self, network_R: torch.Tensor, token_R: torch.Tensor) -> torch.Tensor:
            return tokens_KLD[network_R, token_R]

    config = GeneratorConfig(
        num_tokens=codec.num_tokens, dim_per_token=128, d_model=128, d_state=32, num_states=1, channels=SMALL
    )
    batch = 1 if shared else BATCH
    task = GeneratorTask(
        config, build=lambda: build_generator(config, codec), tokens=Tokens(),
        sources=find_sources(torch.zeros(len(states), dtype=torch.int64), None, use_states=True),
        valid_L=codec.valid_L, seed=seed, tokens_per_network=128 // batch, shared=shared,
    )  # fmt: skip
    run_dir = folder / f"{'shared' if shared else 'each'}-{seed}"
    trainer = TrainerConfig(
        run_dir=str(run_dir), total_steps=STEPS, seed=seed, precision="fp32", ema_decay=None, log_interval_steps=1,
        batch=BatchConfig(global_size=batch, micro_size=batch),
        optim=OptimConfig(lr=1e-3, warmup=0, schedule="cosine_lagged"), tracking=TrackingConfig(progress=False),
    )  # fmt: skip
    loader = build_train_loader(
        NetworkNumbers(len(states)), global_size=batch, micro_size=batch, seed=seed, rank=0, world_size=1, num_workers=0
    )
    fit(task, trainer, train_loader=loader)
    return statistics.mean(record["train/loss"] for record in read_records(run_dir)[-LAST:])


def compare_losses() -> tuple[dict[str, list[float]], float]:
    """Losses of both schemes, and their difference in standard errors."""
    recipe = replace(DigitRecipe(), epochs=10, num_checkpoints=50)
    states = list(train_network(0, recipe))
    with tempfile.TemporaryDirectory() as folder:
        losses = {
            name: [train_losses(Path(folder), shared=shared, seed=seed, states=states) for seed in range(SEEDS)]
            for name, shared in (("shared", True), ("per network", False))
        }
    spread = math.sqrt(sum(statistics.variance(values) / SEEDS for values in losses.values()))
    difference = statistics.mean(losses["shared"]) - statistics.mean(losses["per network"])
    return losses, difference / spread


def measure(repeats: int = 5) -> dict:
    """All figures."""
    runs = {
        "small denoiser, per network": build_step(SMALL, shared=False),
        "small denoiser, shared": build_step(SMALL, shared=True),
    }
    seconds = interleaved(runs, repeats)
    paper = interleaved(
        {
            "paper's denoiser, per network": build_step(PAPER, shared=False),
            "paper's denoiser, shared": build_step(PAPER, shared=True),
        },
        max(1, repeats // 2),
    )
    seconds |= paper
    losses, sigmas = compare_losses()
    small = seconds["small denoiser, per network"] / seconds["small denoiser, shared"]
    large = seconds["paper's denoiser, per network"] / seconds["paper's denoiser, shared"]
    return {
        "step": f"D = M = {WIDTH}, L {TOKENS}, {BATCH} networks or one state, {ROWS} tokens trained",
        "tokens per second": {name: round(ROWS / value, 1) for name, value in seconds.items()},
        "loss": {name: f"{statistics.mean(values):.4f}" for name, values in losses.items()},
        "speed with the paper's denoiser": large,
        "ratios": [{"name": "tokens per second over the released scheme", "ratio": small, "target": SPEED}],
        "checks": [
            {"claim": "losses at equal steps differ by at most (standard errors)", "measured": abs(sigmas),
             "threshold": SIGMAS, "passed": abs(sigmas) <= SIGMAS},
        ],
    }  # fmt: skip


if __name__ == "__main__":
    main(measure, __doc__)
