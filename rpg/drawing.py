"""Networks drawn from a generator for an evaluation, and what drawing them costs.

The networks lie in ``work_dir/networks`` and are kept: the same evaluation finds them there.
"""

import hashlib
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.parallel import Parallel
from rpg.efficiency import peak_memory
from rpg.evaluation_config import EvaluateConfig
from rpg.generated_files import read_records
from rpg.generation import generate
from rpg.generation_config import GenerateConfig
from rpg.generation_run import DEFAULT_NETWORKS, build_conditions, sampler_of, write_networks
from rpg.loading import LoadedGenerator, load_generator
from rpg.requests import build_requests
from rpg.tasks import NUM_CLASSES

logger = logging.getLogger(__name__)
FOLDER = "networks"


@dataclass(frozen=True)
class Drawing:
    """A loaded generator and what an evaluation draws from it."""

    config: EvaluateConfig
    options: GenerateConfig
    loaded: LoadedGenerator

    def draw(self) -> Path:
        """Draws the networks unless they are there; returns their folder.

        Raises: ConfigError for tasks, states or a sampler that the generator does not take.
        """
        key = hashlib.sha256(f"{self.options.settings()} {self.loaded.digest}".encode()).hexdigest()[:12]
        folder = Path(self.config.work_dir) / FOLDER / key
        if records := read_records(folder):  # written when all networks are
            logger.info("%d networks were drawn before and lie in %s.", len(records), folder)
            return folder
        conditions = build_conditions(self.options, self.loaded, self.loaded.device)
        alone = Parallel(0, 1, 0, self.loaded.device)
        options = replace(self.options, output=str(folder), overwrite=True)
        generation = write_networks(options, self.loaded, conditions, alone)
        logger.info("%s", generation.summary())
        return folder

    def measure(self) -> dict[str, Any]:
        """Seconds and peak memory of drawing networks one at a time, after ``efficiency.warm_up`` that do not count.

        Source: the efficiency run of the RPG paper's code.
        """
        measured, warm_up = self.config.efficiency.networks, self.config.efficiency.warm_up
        conditions = build_conditions(self.options, self.loaded, self.loaded.device)
        requests = build_requests(
            conditions[:1] if conditions else None,
            measured + warm_up,
            seed=self.config.seed,
            states=self.config.states,
            groups=self.loaded.groups,
        )
        sampler = sampler_of(self.options, self.loaded)
        seconds, memory, added = [], [], []
        for place, request in enumerate(requests):
            with peak_memory(self.loaded.device) as peak:
                began = time.perf_counter()
                for _ in generate(
                    self.loaded, [request], sampler, seed=self.config.seed, rows_per_pass=self.config.rows_per_pass
                ):
                    if self.loaded.device.type == "cuda":
                        torch.cuda.synchronize()
                took = time.perf_counter() - began
            if place >= warm_up:
                seconds.append(took)
                memory.append(peak.gigabytes)
                added.append(peak.added_gigabytes)
        seconds_R = torch.tensor(seconds, dtype=torch.float64)
        network = self.loaded.config
        return {
            "networks": measured,
            "seconds_per_network": float(seconds_R.mean()),
            "standard_error_of_seconds": float(seconds_R.std()) / math.sqrt(measured) if measured > 1 else None,
            "evaluations_per_token": 1 if network.head == "mse" else sampler.evaluations(network.diffusion_steps),
            "tokens": network.num_tokens,
            "values": int(self.loaded.codec.valid_L.sum()),
            "parameters_of_the_generator": sum(value.numel() for value in self.loaded.model.parameters()),
            "peak_memory_gb": max(memory),
            "peak_memory_above_start_gb": max(added),
            "peak_memory_is": "of the GPU" if self.loaded.device.type == "cuda" else "resident, whole process",
            "device": str(self.loaded.device),
        }


def open_generator(config: EvaluateConfig) -> Drawing:
    """Loads ``config.generator``.

    Raises: CheckpointError if there is none.
    """
    loaded = load_generator(
        config.generator, config.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    is_conditional = loaded.config.condition != "none"
    tasks = config.tasks
    if tasks is None and is_conditional and loaded.config.condition_size == NUM_CLASSES:
        tasks = "unseen"
    options = GenerateConfig(
        generator=config.generator,
        device=config.device,
        num_generated=config.num_generated or (1 if is_conditional else DEFAULT_NETWORKS),
        states=config.states,
        seed=config.seed,
        tasks=tasks,
        num_tasks=config.num_tasks,
        features=config.features,
        sampling=config.sampling,
        rows_per_pass=config.rows_per_pass,
        output=str(Path(config.work_dir) / FOLDER),
        format="pth" if loaded.facts.adapter_config is None else "peft",
        progress=config.progress,
    )
    return Drawing(config, options, loaded)
