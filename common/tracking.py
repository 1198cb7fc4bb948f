"""The record of a run: ``metrics.jsonl``, one JSON object per logged step; TensorBoard and W&B are fed from it.

A record is ``{"step": int, "time": unix seconds, "<name>": number, ...}`` with names such as ``train/loss``,
``train/lr``, ``throughput/tokens_per_second``, ``validation/loss``. Values that are not finite are written as null,
because JSON has no word for them.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from common.config import TrackingConfig
from common.errors import ConfigError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb/run_id"


class Sink(Protocol):
    """A dashboard that gets a copy of every record."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Appends records to ``run_dir/metrics.jsonl`` and copies them to the sinks; silent on all but the main process.

    Args:
        run_dir: folder of the run; made if it does not exist.
        config: which sinks, and the names under which they show the run.
        is_main: whether this process writes at all.

    Raises: ConfigError if a sink is asked for whose package is not installed.
    """

    def __init__(self, run_dir: Path | str, config: TrackingConfig, is_main: bool = True) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.config, self.is_main = config, is_main
        self._file = None
        self._sinks: list[Sink] | None = None
        self._first_step = 0
        if is_main:
            check_packages(config)

    def resume_at(self, step: int) -> None:
        """Drops the records after ``step``, whose steps will run again, and a last line that a kill cut off.

        The file is replaced as a whole, so a kill during this call loses nothing.
        """
        self._first_step = step
        if not self.is_main or not self.path.is_file():
            return
        content = self.path.read_bytes()
        kept = b"".join(line for line in content.splitlines(keepends=True) if _belongs(line, step))
        if kept == content:
            return
        self._close_file()
        temporary = self.path.with_name(f".{METRICS_FILE}.tmp")
        with open(temporary, "wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one record; on disk (in the operating system's hands) when the call returns."""
        if not self.is_main:
            return
        record = {"step": int(step), "time": round(time.time(), 3)}
        record |= {name: _plain(value) for name, value in values.items()}
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        # one write call for the whole line: a kill leaves it whole or cut at the end, never mixed with another
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for sink in self._open_sinks():
            sink.log(step, values)

    def close(self) -> None:
        """Ends the record and the sinks; may be called again."""
        self._close_file()
        for sink in self._sinks or []:
            sink.close()
        self._sinks = []

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_sinks(self) -> list[Sink]:
        # at the first record, not at the start: opening a dashboard takes seconds, and a bad run never gets here
        if self._sinks is None:
            run_dir = self.path.parent
            self._sinks = []
            if self.config.tensorboard:
                self._sinks.append(TensorBoardSink(run_dir, self._first_step))
            if self.config.wandb != "disabled":
                self._sinks.append(WandbSink(run_dir, self.config))
        return self._sinks


def check_packages(config: TrackingConfig) -> None:
    """Raises ConfigError if a sink of ``config`` needs a package that is not installed."""
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb != "disabled"}
    for package, used in wanted.items():
        if used and importlib.util.find_spec(package) is None:
            off = "tracking.tensorboard=false" if package == "tensorboard" else "tracking.wandb=disabled"
            raise ConfigError(
                f"tracking.{package} is on, but the package {package} is not installed; install it with "
                f"`pip install {package}` or set {off} (metrics.jsonl is written in any case)."
            )


def read_records(path: Path | str) -> list[dict]:
    """All complete records of a ``metrics.jsonl`` (or of the one in a run folder), in order."""
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if _belongs(line, math.inf)]


def _belongs(line: bytes, last_step: float) -> bool:
    """Whether ``line`` is a complete record of a step up to ``last_step``."""
    if not line.endswith(b"\n"):
        return False
    try:
        return json.loads(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
        return False


def _plain(value: object) -> float | int | None:
    number = value if isinstance(value, int) and not isinstance(value, bool) else float(value)
    return number if math.isfinite(number) else None


class TensorBoardSink:
    """Event files in ``run_dir/tensorboard``; those of steps that run again are hidden by TensorBoard."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """A Weights & Biases run, by default offline in ``run_dir/wandb``; a continued run keeps its id.

    Send an offline run with ``wandb sync <run_dir>/wandb/offline-run-*``.
    """

    def __init__(self, run_dir: Path, config: TrackingConfig) -> None:
        import wandb

        resolved = run_dir / "config.json"
        self.run = wandb.init(
            project=config.project,
            name=config.run_name or run_dir.resolve().name,
            id=self._run_id(run_dir),
            resume="allow",
            mode=config.wandb,
            dir=str(run_dir),
            config=json.loads(resolved.read_text()) if resolved.is_file() else None,
        )
        # the step of the run as x axis: W&B's own step refuses to go back after a restart
        self.run.define_metric("*", step_metric="step")

    @staticmethod
    def _run_id(run_dir: Path) -> str:
        path = run_dir / WANDB_ID_FILE
        with contextlib.suppress(OSError):
            if text := path.read_text().strip():
                return text
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
        return path.read_text()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "step": step})

    def close(self) -> None:
        self.run.finish()
