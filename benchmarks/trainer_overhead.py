"""Trainer against a bare loop of the same model: the same batches, draws, loss, clipping, optimizer and average.

    python -m benchmarks.run trainer_overhead

The bare loop's steps run inside a hook of the trainer, after every trainer step, so the two alternate within one
process and whatever else the machine does disturbs both alike. The trainer's time is all that passes between two hooks:
data loading, draws, checks for signals and NaN, logging to metrics.jsonl.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from common.config import BatchConfig, OptimConfig, TrackingConfig, TrainerConfig
from common.data.corpora import build_text_dataset
from common.data.loader import build_train_loader
from common.data.tokenizer import ByteTokenizer
from common.optim import learning_rate
from common.trainer import fit
from radd.config import TrainConfig, TrainingConfig
from radd.losses import corrupt
from radd.model import ModelConfig
from radd.task import RADDTask

STEPS, WARM_STEPS = 48, 8
BATCH, LENGTH = 8, 128
TARGET = 0.03  # share of a bare step's time


class BareLoop:
    """A hook that makes one step of a plain PyTorch loop each time, and keeps both loops' times.

    Attributes:
        bare, trainer: seconds of each step.
    """

    every_steps = 1

    def __init__(self, task: RADDTask, tokens: torch.Tensor, optim: OptimConfig, decay: float) -> None:
        self.task, self.tokens, self.config, self.decay = task, tokens, optim, decay
        torch.manual_seed(0)
        self.model = task.build_model()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=0.0, fused=True
        )
        self.parameters = list(self.model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.step = 0
        self.bare: list[float] = []
        self.trainer: list[float] = []
        self.left: float | None = None

    def __call__(self, state: object) -> None:
        entered = time.perf_counter()
        if self.left is not None:
            self.trainer.append(entered - self.left)
        self.train_one_step()
        self.left = time.perf_counter()
        self.bare.append(self.left - entered)

    def train_one_step(self) -> float:
        """What a researcher would write."""
        rows = (self.step * BATCH + torch.arange(BATCH)) % len(self.tokens)
        x_BL = self.tokens[rows]
        draws = self.task.draw(self.step, BATCH)
        loss_type = self.task.loss.loss_type
        state = corrupt(loss_type, x_BL, draws, self.task.schedule, mask_id=self.task.tokens)
        loss = self.model(state.z_BL, x_BL, state.where_BL, state.weight_B)[0] / x_BL.numel()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step + 1, self.config, STEPS)
        nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(self.decay, (2 + self.step) / (11 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        self.step += 1
        return loss.item()


def measure() -> dict:
    """Medians of both loops' steps, and the trainer's overhead as the median of the paired ratios."""
    model = ModelConfig(hidden_size=256, n_blocks=4, n_heads=4, length=LENGTH, dropout=0.0)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            run_dir=str(Path(folder) / "run"),
            tokens=ByteTokenizer.vocab_size,
            model=model,
            training=TrainingConfig(batch_size=BATCH, n_iters=STEPS, loss_type="k_DCE"),
        )
        trainer = TrainerConfig(
            run_dir=config.run_dir,
            total_steps=STEPS,
            batch=BatchConfig(global_size=BATCH, micro_size=BATCH),
            optim=OptimConfig(warmup=10),
            tracking=TrackingConfig(progress=False),
            precision="fp32",
            log_interval_steps=10,
        )
        data = build_text_dataset("embedded", "train", length=LENGTH, tokenizer=ByteTokenizer(), cache_dir=folder)
        tokens = torch.stack([data[index]["tokens"] for index in range(STEPS * BATCH)])
        task = RADDTask(config)
        loader = build_train_loader(data, global_size=BATCH, micro_size=BATCH, seed=0, rank=0, world_size=1)
        loop = BareLoop(task, tokens, trainer.optim, trainer.ema_decay)
        fit(task, trainer, train_loader=loader, hooks=[loop])
    # Trainer step i runs between bare steps i - 1 and i: compare it with the mean of its neighbours.
    first, second = loop.bare[:-1], loop.bare[1:]
    paired = [2 * t / (a + b) for t, a, b in zip(loop.trainer, first, second)][WARM_STEPS:]
    overhead = statistics.median(paired) - 1
    extra = [t - (a + b) / 2 for t, a, b in zip(loop.trainer, first, second)][WARM_STEPS:]
    return {
        "trainer step, median seconds": statistics.median(loop.trainer[WARM_STEPS:]),
        "bare step, median seconds": statistics.median(loop.bare[WARM_STEPS:]),
        "overhead, median of paired ratios": overhead,
        "overhead, median milliseconds a step": 1000 * statistics.median(extra),
        "parameters": sum(parameter.numel() for parameter in loop.parameters),
        "steps of each": len(paired),
        "checks": [
            {
                "claim": "the trainer costs at most 3 % more than a bare loop",
                "measured": f"{overhead:+.2%}",
                "threshold": f"<= {TARGET:.0%}",
                "passed": overhead <= TARGET,
            }
        ],
    }
