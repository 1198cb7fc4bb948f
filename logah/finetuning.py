"""Training one network from several starts, side by side: every start with every seed and every learning rate.

The run folder then holds ``runs/<start>-seed<seed>-lr<rate>/`` (checkpoints, metrics.jsonl, export/) and over all of
them ``results.json``, ``section.html``, tables and curves with bands. The same command continues.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from common import cli
from common.checkpoint import find_checkpoint, load_weights, step_of, write_json
from common.data.loader import build_validation_loader
from common.errors import ConfigError
from common.evaluation.partial_results import fingerprint
from common.nonfinite import NonFiniteError
from common.parallel import Parallel, start
from common.precision import autocast_forward, resolve_precision
from common.report.section_folder import RESULTS, holds_section
from common.tracking import read_records
from common.trainer import REQUEUE_FILE, fit
from logah.architectures import Architecture, resolve_target
from logah.data import TrainingData, build_data, build_train_loader
from logah.finetune_config import FinetuneConfig
from logah.finetune_task import NETWORK_PREFIX, FinetuneTask
from logah.matching import match_data
from logah.mixed_rows import MixedRows
from logah.prediction_folder import write_module_folder
from logah.scoring import metric_values, score
from logah.starts import EXPORT_FOLDER, Start, Started, Starter, file_facts

RUNS_FOLDER, STARTS_FOLDER, TEST_FILE = "runs", "starts", "test.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunKey:
    """One training."""

    start: Start
    seed: int
    lr: float

    @property
    def folder(self) -> str:
        return f"{self.start.label}-seed{self.seed}-lr{self.lr:g}"


@dataclass
class RunResult:
    """What one training gave.

    Attributes:
        points: (step, values on the split that curves show); step 0 is before training.
        test: values on the test data after training; empty where that is not wanted.
        facts: what is to be said about the start (tensors that kept random values, ...).
        diverged: the loss became NaN or infinite, and the curve ends there.
    """

    key: RunKey
    points: list[tuple[int, dict[str, float]]]
    test: dict[str, float | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    diverged: bool = False
    seconds: float = 0.0


@dataclass
class Finetuned:
    """All trainings of a command."""

    kind: str
    steps_per_epoch: int
    runs: list[RunResult]
    stopped_early: bool = False


def finetune(config: FinetuneConfig) -> Finetuned:
    """Trains every start and, on the main process, writes what came out.

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair.
    """
    from logah.finetune_report import write_report

    folder = Path(config.run_dir)
    if (folder / RESULTS).exists() and not holds_section(folder):
        raise ConfigError(f"run_dir={folder} holds {RESULTS} of something else; choose another folder.")
    with start(config.parallel.plan) as parallel:
        comparison = Comparison(config, parallel)
        comparison.check_starts()
        results, stopped = [], False
        for key in comparison.planned():
            result = comparison.run(key)
            if result is None:
                stopped = True
                break
            results.append(result)
        found = Finetuned(comparison.architecture.kind, comparison.data.steps_per_epoch, results, stopped)
        if parallel.is_main:
            if stopped:
                write_json(folder / REQUEUE_FILE, {"finished_runs": len(results)})
            else:
                write_report(config, comparison.architecture, found)
    return found


class Comparison:
    """The network, the data and the trainings of one command.

    Raises: ConfigError, DataError or CheckpointError, before anything is trained, for a target or data that do not fit.
    """

    def __init__(self, config: FinetuneConfig, parallel: Parallel) -> None:
        self.config, self.parallel = config, parallel
        self.seeds = config.seeds or [config.seed]
        self.rates = config.lrs or [config.optim.lr]
        self.data: TrainingData = build_data(config.data, seed=self.seeds[0])
        self.architecture: Architecture = match_data(
            resolve_target(config.target), self.data, enabled=config.match_data
        )
        self.starter = Starter(self.architecture, config.start)
        self.device = parallel.device
        self.precision = resolve_precision(config.precision, self.device, config.parallel.plan)
        for key in self.planned():  # options that do not fit each other, before the first training
            self._engine(key)
        if parallel.is_main:
            Path(config.run_dir, REQUEUE_FILE).unlink(missing_ok=True)

    def planned(self) -> Iterator[RunKey]:
        """All trainings, seed by seed: a stopped comparison then has whole rows."""
        for seed in self.seeds:
            for beginning in self.config.starts:
                for rate in self.rates:
                    yield RunKey(beginning, seed, rate)

    def run(self, key: RunKey) -> RunResult | None:
        """One training, or what it left when it ran before; None: a signal stopped it."""
        folder = Path(self.config.run_dir, RUNS_FOLDER, key.folder)
        if self.data.train.seed != key.seed:
            self.data = self.data.with_seed(key.seed)
        made, facts = self._evaluated_start(key)
        began, diverged = time.perf_counter(), False
        engine = self._engine(key)
        task = self._task(key, made)
        try:
            done = fit(
                task,
                engine,
                train_loader=build_train_loader(
                    self._training_data(),
                    micro_size=engine.batch.micro_size,
                    rank=self.parallel.rank,
                    world_size=self.parallel.world_size,
                ),
                validation_loader=build_validation_loader(
                    self._split(self.config.training.evaluate_on), batch_size=self.data.section.eval_batch_size
                ),
                run_config=self._run_config(key),
            )
        except NonFiniteError as error:
            logger.warning("%s diverged: %s", key.folder, error)
            diverged = True
        else:
            if done.stopped_early:
                return None
        test = {} if diverged else self._finish(key, folder, engine.total_steps)
        points = [(0, facts["values"]), *curve_points(folder)]
        return RunResult(key, points, test, facts["facts"], diverged, time.perf_counter() - began)

    def check_starts(self) -> None:
        """Scores every start with the first seed, so that one that does not fit is refused before hours of training.

        A single one is left to its training, which begins with that and then need not make the network again.
        """
        for beginning in self.config.starts if len(self.config.starts) > 1 else ():
            self._evaluated_start(RunKey(beginning, self.seeds[0], self.rates[0]))

    # ------------------------------------------------------------------------------------------------- its parts

    def _training_data(self) -> TrainingData:
        training = self.config.training
        if not training.mixes:
            return self.data
        rows = MixedRows(
            self.data.train,
            self.data.batch_size,
            mixup=training.mixup,
            cutmix=training.cutmix,
            probability=training.mix_probability,
            switch=training.mix_switch,
        )
        return replace(self.data, train=rows)

    def _split(self, name: str) -> Any:
        return self.data.validation if name == "validation" else self.data.test

    def _engine(self, key: RunKey) -> Any:
        return self.config.engine(
            str(Path(self.config.run_dir, RUNS_FOLDER, key.folder)),
            seed=key.seed,
            optim=replace(self.config.optim, lr=key.lr),
            steps_per_epoch=self.data.steps_per_epoch,
            world_size=cli.world_size(),
        )

    def _task(self, key: RunKey, made: Started | None) -> FinetuneTask:
        training = self.config.training
        ready = [made.network] if made is not None else []

        def build() -> nn.Module:
            # the network that was scored is the one that is trained; made again where it was scored in an earlier run
            return ready.pop() if ready else self.starter.make(key.start, key.seed).network

        return FinetuneTask(
            build,
            self.architecture.kind,
            loss=training.loss,
            smoothing=training.label_smoothing,
            block_size=self.data.block_size if self.architecture.kind == "lm" else None,
            image_size=self.architecture.image_size,
            decay=training.decay,
        )

    def _run_config(self, key: RunKey) -> dict[str, Any]:
        """What decides this training; other starts, seeds and rates may join the comparison later."""
        described = asdict(self.config)
        for name in ("inits", "seeds", "lrs", "run_dir", "name"):
            del described[name]
        described["start"] |= asdict(key.start) | {"label": None, "files": file_facts(key.start.source)}
        described["optim"]["lr"] = key.lr
        return described | {"seed": key.seed, "target": self.architecture.to_json()}

    def _evaluated_start(self, key: RunKey) -> tuple[Started | None, dict[str, Any]]:
        """The network with its initial weights, and what is known of them (``values``: its scores).

        None instead of the network if the same start was scored before, for another learning rate or by an earlier
        command; the values are kept in ``starts/``.
        """
        path = Path(self.config.run_dir, STARTS_FOLDER, f"{key.start.label}-seed{key.seed}.json")
        split = self.config.training.evaluate_on
        settings = fingerprint({
            "start": asdict(key.start), "files": file_facts(key.start.source), "options": asdict(self.config.start),
            "target": self.architecture.key, "data": asdict(self.config.data), "split": split,
            "precision": self.precision,
        })  # fmt: skip
        known = None
        if self.parallel.is_main and path.is_file():
            found = json.loads(path.read_text())
            known = found if found["settings"] == settings else None
        known = self.parallel.from_main(known)
        if known is not None:
            return None, known
        made = self.starter.make(key.start, key.seed)
        known = {"values": self._score(made.network, split), "facts": made.facts, "settings": settings}
        if self.parallel.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)
        return made, known

    def _finish(self, key: RunKey, folder: Path, last_step: int) -> dict[str, float | None]:
        """Scores the trained network on the test data and writes it; both once."""
        export, training = folder / EXPORT_FOLDER, self.config.training
        wanted = training.final_test and not (folder / TEST_FILE).is_file()
        wanted = wanted or training.export and not export.is_dir()
        if not self.parallel.from_main(wanted if self.parallel.is_main else None):
            return json.loads((folder / TEST_FILE).read_text())["values"] if training.final_test else {}
        checkpoint = find_checkpoint(folder)
        if checkpoint is None or step_of(checkpoint) < last_step:
            raise ConfigError(f"{folder} holds no checkpoint of step {last_step}; remove the folder and run again.")
        state, _ = load_weights(folder)
        network = self.architecture.build()
        network.load_state_dict({name.removeprefix(NETWORK_PREFIX): value for name, value in state.items()})
        test = self._score(network, "test") if training.final_test else {}
        if self.parallel.is_main:
            if training.final_test:
                write_json(folder / TEST_FILE, {"step": last_step, "values": test})
            if training.export:
                facts = {"run": key.folder, "step": last_step, "test": test}
                write_module_folder(export, self.architecture, network.cpu(), metadata=facts, overwrite=True)
        self.parallel.barrier()
        return test

    def _score(self, network: nn.Module, split: str) -> dict[str, float | None]:
        """Means over the split and their standard errors, by the names that the engine's records have."""
        network.to(self.device)
        autocast_forward(network, self.precision, self.device)
        batches = self.data.validation_batches if split == "validation" else self.data.test_batches
        try:
            metrics = score(
                network,
                batches(self.parallel.rank, self.parallel.world_size),
                kind=self.architecture.kind,
                device=self.device,
                batchnorm="auto",
                image_size=self.architecture.image_size,
                parallel=self.parallel,
            )
        finally:
            network.__dict__.pop("forward", None)  # the engine wraps the network in an autocast of its own
        values = metric_values(metrics)
        return {name.replace("nats_per_token", "loss").replace("nats", "loss"): value for name, value in values.items()}


def curve_points(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, values) of the evaluations during one training; text gains its perplexity."""
    points = []
    for record in read_records(folder):
        found = {
            name.removeprefix("validation/"): value for name, value in record.items() if name.startswith("validation/")
        }
        if found.get("loss") is None:
            continue
        if "top1" not in found:
            found["perplexity"] = math.exp(found["loss"]) if found["loss"] < 700 else math.inf
        points.append((record["step"], found))
    return points
