"""What a training run really takes: a few steps in a folder that is thrown away, seconds and peak memory."""

import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch

from common.hooks import TrainState
from rpg.config import TrainConfig
from rpg.efficiency import peak_memory
from rpg.training import run_training

STEPS = 10
WARM_UP = 2  # steps that seconds leave out: kernels are chosen and buffers allocated in them


class StepClock:
    """Hook that notes when each step ended."""

    every_steps = 1

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, state: TrainState) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each step but the first ones."""
        took = [after - before for before, after in zip(self.times, self.times[1:])]
        return took[WARM_UP:] or took


def measure_training(config: TrainConfig, steps: int = STEPS) -> dict[str, Any]:
    """Trains ``steps`` steps as configured and reports what they took; nothing of the run stays.

    The tokens are built (or found) where the run would have them, so the first real run is spared that.

    Returns: seconds of a step (median), peak memory, and peak memory above what was in use before the run.

    Raises: ConfigError or DataError, as the run itself would.

    Source: the memory run of the RPG paper's code.
    """
    clock = StepClock()
    with tempfile.TemporaryDirectory(prefix="rpg-memory-") as folder:
        training = replace(
            config.training, n_iters=steps, sample_freq=0, snapshot_freq=0, save_freq=steps, log_freq=steps
        )
        tracking = replace(config.tracking, progress=False, wandb="disabled", tensorboard=False)
        short = replace(config, run_dir=folder, training=training, tracking=tracking)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with peak_memory(device) as peak:
            run_training(short, hooks=lambda prepared: [clock])
    seconds = clock.seconds()
    return {
        "steps": steps,
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        "peak_memory_gb": peak.gigabytes,
        "peak_memory_above_start_gb": peak.added_gigabytes,
        "peak_memory_is": "of the GPU" if device.type == "cuda" else "resident, whole process",
        "batch_size": config.training.batch_size,
        "tokens_per_step": config.training.diffusion_batch,
        "precision": config.precision,
    }
