"""Runs of a sweep: each in a folder of its own, continued after a stop, ended early when it has diverged.

What a run gave is one file, ``arm.json``; a run that has it is finished and is not started again.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import provenance
from common.checkpoint import write_json
from common.config import require_at_least
from common.data.loader import Batch, BatchedDataset
from common.errors import CheckpointError, ConfigError, QuintetError
from common.hooks import Hook, TrainState
from common.nonfinite import NonFiniteError
from common.tracking import METRICS_FILE, read_records
from common.trainer import FitResult
from mup_dit.sweep import ArmResult, exceeds

RESULT = "arm.json"
LOSS = "validation/loss"
NOT_FINITE = "not finite"

logger = logging.getLogger(__name__)


class Diverged(QuintetError):
    """A run's loss is far above that of other runs at the same step."""


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a run counts as diverged. Needs common random numbers: runs see the same batches, times and noise."""

    factor: float | None = 1.5  # training loss over the best of the same width at the same step; null: never stop
    after: float = 0.1  # share of the steps before which nothing is judged
    patience: int = 3  # logged losses in a row that must exceed the factor

    def __post_init__(self) -> None:
        if self.factor is not None and not self.factor > 1:
            raise ConfigError(f"sweep.stop.factor={self.factor} must be above 1; null never stops a run.")
        if not 0 <= self.after <= 1:
            raise ConfigError(f"sweep.stop.after={self.after} is a share of the run; it must lie in [0, 1].")
        require_at_least("sweep.stop.patience", self.patience, 1)


class StopDiverged:
    """A hook that ends a run by its own and other runs' ``metrics.jsonl``; the main process decides for all.

    Args:
        others: finds the folders of runs to compare with; they may be unfinished, or appear and grow meanwhile.
        every_steps: steps between logged losses.
    """

    def __init__(
        self, rule: StopRule, others: Callable[[], Iterable[Path]], *, every_steps: int, total_steps: int
    ) -> None:
        assert rule.factor is not None
        self.rule, self.others, self.every_steps = rule, others, every_steps
        self.first_step = math.ceil(rule.after * total_steps)

    def __call__(self, state: TrainState) -> None:
        """Raises: Diverged, on every rank."""
        if state.step < self.first_step:
            return
        if state.parallel.from_main(self._is_hopeless(state.run_dir) if state.is_main else None):
            raise Diverged(f"loss above {self.rule.factor:g} times the best run's at step {state.step}")

    def _is_hopeless(self, run_dir: Path) -> bool:
        own = finite_curve(run_dir)
        others = [curve for curve in map(finite_curve, self.others()) if curve]
        return exceeds(own, others, factor=self.rule.factor, patience=self.rule.patience)


def finite_curve(run_dir: Path) -> dict[int, float]:
    """step -> training loss; infinite where it was not finite."""
    return {step: math.inf if loss is None else loss for step, loss in training_curve(run_dir)}


def training_curve(run_dir: Path) -> tuple[tuple[int, float | None], ...]:
    """(step, training loss) of a run's records; empty if it has none."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return ()
    records = [record for record in read_records(path) if "train/loss" in record]
    return tuple((record["step"], record["train/loss"]) for record in records)


# ---------------------------------------------------------------- one run


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is known of a run before it starts."""

    width: int
    loglr: float
    seed: int
    planned_steps: int
    batch_size: int
    parameters: int
    settings: Mapping[str, float] | None = None


def run_arm(
    run_dir: Path | str,
    arm: Arm,
    train: Callable[[Sequence[Hook]], FitResult],
    *,
    options: Mapping,
    others: Callable[[], Iterable[Path]] = tuple,
    rule: StopRule | None = None,
    log_interval: int = 1,
    is_main: bool = True,
) -> ArmResult | None:
    """Trains one run, or continues it, or returns what it gave.

    Args:
        train: runs ``fit`` in ``run_dir`` with the given hooks, validating after the last step.
        options: all that the result depends on; kept beside it and compared.
        others: finds the folders of the runs that ``rule`` compares with.
        log_interval: steps between logged losses.
        is_main: whether this process writes.

    Returns: the result; None if a signal stopped the run, so that the same command continues it.
    Raises: ConfigError if the folder holds a finished run with other options.
    """
    run_dir = Path(run_dir)
    plain = json.loads(json.dumps(dict(options), default=str))
    found = read_arm(run_dir)
    if found is not None:
        require_same_options(run_dir, plain)
        return found
    hooks: list[Hook] = []
    if rule is not None and rule.factor is not None:
        hooks.append(StopDiverged(rule, others, every_steps=log_interval, total_steps=arm.planned_steps))
    loss, stopped = math.inf, None
    try:
        done = train(hooks)
    except NonFiniteError:
        stopped = NOT_FINITE
    except Diverged as reason:
        stopped = str(reason)
    else:
        if done.stopped_early:
            return None
        loss = done.metrics.get(LOSS, math.nan)
        if not math.isfinite(loss):
            loss, stopped = math.inf, NOT_FINITE
    curve = training_curve(run_dir)
    steps = max((step for step, _ in curve), default=0) if stopped else arm.planned_steps
    result = ArmResult(
        width=arm.width,
        loglr=arm.loglr,
        seed=arm.seed,
        loss=loss,
        steps=steps,
        planned_steps=arm.planned_steps,
        batch_size=arm.batch_size,
        parameters=arm.parameters,
        curve=curve,
        settings=arm.settings,
        stopped=stopped,
    )
    if is_main:
        content = {"result": result.as_dict(), "options": plain, **provenance.collect(seed=arm.seed)}
        write_json(run_dir / RESULT, content)
    return result


def read_arm(run_dir: Path) -> ArmResult | None:
    """What the run in ``run_dir`` gave; None if it is not finished.

    Raises: CheckpointError if the file is damaged.
    """
    path = Path(run_dir) / RESULT
    if not path.is_file():
        return None
    try:
        return ArmResult.from_dict(json.loads(path.read_text())["result"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a run's result ({error!r}); delete it to run this one again.") from error


def require_same_options(run_dir: Path, options: Mapping) -> None:
    """Raises ConfigError if the finished run in ``run_dir`` had other options."""
    saved = json.loads((run_dir / RESULT).read_text()).get("options", {})
    different = sorted(name for name in {*saved, *options} if saved.get(name) != options.get(name))
    if different:
        raise ConfigError(
            f"{run_dir} holds a finished run with other values of {', '.join(different)}; use another run_dir for the "
            "new sweep, or delete that folder to run it again."
        )


@dataclass(frozen=True)
class FinishedArm:
    """A run's result and the options it ran with."""

    result: ArmResult
    options: Mapping


def read_sweep(folder: Path) -> tuple[list[FinishedArm], list[Path]]:
    """Finished runs below ``folder``, ordered by width, rate and seed; and the folders of unfinished ones."""
    finished, unfinished = [], []
    for path in sorted(Path(folder).glob("*/config.json")):
        result = read_arm(path.parent)
        if result is None:
            unfinished.append(path.parent)
        else:
            finished.append(FinishedArm(result, json.loads((path.parent / RESULT).read_text())["options"]))
    return sorted(finished, key=lambda arm: (arm.result.width, arm.result.loglr, arm.result.seed)), unfinished


def flat(options: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested options by dotted name."""
    found: dict[str, object] = {}
    for name, value in options.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        found |= inner
    return found


def siblings(run_dir: Path, options: Mapping, varied: Iterable[str]) -> list[Path]:
    """Folders beside ``run_dir`` of runs whose options differ in nothing but ``varied`` (dotted names)."""

    def rest(values: Mapping) -> dict[str, object]:
        return {name: value for name, value in flat(values).items() if name not in varied}

    own, found = rest(json.loads(json.dumps(dict(options), default=str))), []
    for path in sorted(run_dir.parent.glob("*/config.json")):
        if path.parent == run_dir:
            continue
        try:
            other = json.loads(path.read_text())
        except ValueError:  # its run is just writing it
            continue
        if rest(other) == own:
            found.append(path.parent)
    return found


class Repeated:
    """Every row ``times`` over, so that validation draws more than one (time, noise) for it."""

    def __init__(self, dataset: BatchedDataset, times: int) -> None:
        require_at_least("sweep.validation_draws", times, 1)
        self.dataset, self.times = dataset, times

    def __len__(self) -> int:
        return self.times * len(self.dataset)

    def fetch(self, rows: np.ndarray) -> Batch:
        return self.dataset.fetch(np.asarray(rows) % len(self.dataset))
