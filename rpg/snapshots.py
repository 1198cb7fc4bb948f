"""Networks drawn while a generator trains, and their tests, without holding up any process.

Every process draws its share of the tokens of one network; the main process puts them together, writes the state dict
and has it tested on a thread of its own. Results are logged when they are there; a test that fails is a line in the
log.

Dimensions: L tokens, D values, P width of a prototype.
"""

import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.seeding import derive_seed, generator
from common.trainer import TrainState
from rpg.checkpoint_files import write_checkpoint
from rpg.data import GeneratorData
from rpg.sampling import sample_tokens, token_shares
from rpg.sources import Sources
from rpg.testing import TestResult, build_tester

if TYPE_CHECKING:
    from rpg.config import TrainConfig

TESTS_FILE = "tests.jsonl"
OUTPUT_KEPT = 2000  # characters of a failed test
logger = logging.getLogger(__name__)


class Snapshots:
    """Hook that every ``training.sample_freq`` steps, and at the end, writes ``generated/step_N`` and tests it."""

    at_end = True

    def __init__(self, config: "TrainConfig", data: GeneratorData, sources: Sources) -> None:
        self.config, self.data, self.sources = config, data, sources
        self.every_steps = config.training.sample_freq
        self.tester = build_tester(data.section.tester)
        self.executor: ThreadPoolExecutor | None = None
        self.pending: list[tuple[int, Path, Future[TestResult]]] = []

    def __call__(self, state: TrainState) -> Mapping[str, float]:
        values = self.collect()
        with state.eval_model() as model:
            tokens_LD, name = self.draw(model, state)
        if not state.is_main:
            return values
        values["generated/norm"] = float(tokens_LD.abs().mean())
        try:
            decoded = self.data.codec.decode(tokens_LD)
            path = self.write(decoded, state.run_dir / "generated", f"step_{state.step}{name}", state.step)
        except OSError as error:
            logger.warning("step %d: the generated network could not be written: %s", state.step, error)
            return values
        if self.tester.kind != "none":
            self.executor = self.executor or ThreadPoolExecutor(1, thread_name_prefix="test of a generated network")
            self.pending.append((state.step, path, self.executor.submit(self.tester.test, path)))
        return values

    def draw(self, model: torch.nn.Module, state: TrainState) -> tuple[Tensor, str]:
        """Tokens of one network (whole on every process) and what its file name says of its source."""
        seed, sources = self.config.seed, self.sources
        source = int(torch.randint(len(sources), (1,), generator=generator(seed, "snapshot source", state.step)))
        state_1 = None if sources.state_S is None else sources.state_S[source : source + 1].to(state.device)
        condition_1E = None if sources.condition_SE is None else sources.condition_SE[source : source + 1]
        if condition_1E is not None:
            condition_1E = condition_1E.to(state.device)
        guided = self.config.sampling.guidance != 1
        mine = token_shares(model.config.num_tokens, state.parallel.world_size)[state.parallel.rank]
        part_LD = sample_tokens(
            model,
            model.prototypes(state_1, condition_1E),
            [derive_seed(seed, "snapshot", state.step)],
            self.config.sampling,
            tokens=mine,
            valid_L=self.data.codec.valid_L,
            null_prototypes_nLP=model.prototypes(state_1, None) if guided else None,
        )[0]
        name = ""
        if self.config.data.condition == "class":
            bits = "".join(str(int(bit)) for bit in sources.condition_SE[source])
            name = f"_class{int(bits, 2):04d}"
        return torch.cat(state.parallel.gather(part_LD)), name

    def write(self, decoded: Mapping[str, Tensor], folder: Path, name: str, step: int) -> Path:
        """The state dict as a file; one of the same step, of a run that was continued, is replaced."""
        adapter = self.data.adapter_config is not None
        path = folder / (name if adapter else f"{name}.safetensors")
        write_checkpoint(
            path,
            decoded,
            "peft" if adapter else "safetensors",
            metadata={"step": step, "seed": self.config.seed},
            adapter_config=self.data.adapter_config,
            overwrite=True,
        )
        return path

    def collect(self) -> dict[str, float]:
        """Logs the tests that are done; accuracies by name."""
        values: dict[str, float] = {}
        waiting = []
        for step, path, future in self.pending:
            if not future.done():
                waiting.append((step, path, future))
                continue
            values |= self._report(step, path, future.result())
        self.pending = waiting
        return values

    def _report(self, step: int, path: Path, result: TestResult) -> dict[str, float]:
        record = {"step": step, "file": path.name, "loss": result.loss, "accuracy": result.accuracy}
        record |= {"error": result.error, "seconds": round(result.seconds, 3)}
        if result.error is not None:
            record["output"] = result.output[-OUTPUT_KEPT:]
        with (path.parent.parent / TESTS_FILE).open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        if result.error is not None:
            logger.warning("step %d: the test of %s failed: %s", step, path.name, result.error)
            if result.output:
                logger.warning("its output ended with: %s", result.output[-OUTPUT_KEPT:])
            return {}
        logger.info("step %d: %s: %s", step, path.name, result)
        known = {"generated/accuracy": result.accuracy, "generated/loss": result.loss}
        return {name: value for name, value in known.items() if value is not None}

    def finish(self, step: int) -> None:
        """Waits for the tests that still run; testers bring their own time limits."""
        if self.executor is not None:
            self.executor.shutdown(wait=True)
            self.collect()
