"""Everything of a run that must outlive its process, and when a saved run may be continued."""

import fnmatch
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from common.checkpoint import EMA_FILE, MODEL_FILE, read_manifest, save_weights
from common.ema import EMA
from common.errors import CheckpointError
from common.meters import WeightedMeans, merge
from common.parallel import Parallel
from common.plans import Plan
from common.seeding import derive_seed

logger = logging.getLogger(__name__)

STATE_FOLDER = "state"

# options that cannot change what is computed; everything else must stay as it was
FREE_OPTIONS = (
    "run_dir",
    "name",
    "ngpus",
    "dry_run",
    "allow_config_change",
    "tracking*",
    "checkpoint*",
    "parallel*",
    "log_interval_steps",
    "validate_interval_steps",
    "training.log_freq",
    "training.eval_freq",
    "training.snapshot_freq*",
    "data.cache_dir",
    "data.num_workers",
)


def config_changes(before: object, now: object, prefix: str = "") -> list[str]:
    """``["optim.lr: 0.0003 -> 0.001", ...]`` for options that differ, FREE_OPTIONS aside."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = list(before) + [key for key in now if key not in before]
        missing = "(not set)"
        return [
            change
            for key in keys
            for change in config_changes(before.get(key, missing), now.get(key, missing), f"{prefix}{key}.")
        ]
    key = prefix.removesuffix(".")
    both_nan = before != before and now != now  # NaN, for example of a padding value, differs from itself
    if before == now or both_nan or any(fnmatch.fnmatch(key, pattern) for pattern in FREE_OPTIONS):
        return []
    return [f"{key}: {before!r} -> {now!r}"]


def check_same_config(folder: Path, config: Mapping, allow_change: bool) -> None:
    """Raises CheckpointError with the differences if a run's configuration is not the saved one, unless allowed."""
    changes = config_changes(read_manifest(folder)["config"], json.loads(json.dumps(config, default=str)))
    if not changes:
        return
    text = "; ".join(changes)
    if not allow_change:
        raise CheckpointError(
            f"{folder} was saved with another configuration: {text}. Restore these options, choose a new run_dir, or "
            "set allow_config_change=true to continue with the new ones."
        )
    logger.warning("continuing %s with a changed configuration: %s", folder, text)


def state_stages(
    plan: Plan, ema: EMA | None, loader: object, means: WeightedMeans, parallel: Parallel
) -> list[Callable[[Path], None]]:
    """What fills a checkpoint folder, for ``write_checkpoint``: whole weights, then what the plan needs."""

    def write_weights(folder: Path) -> None:
        weights = plan.full_state()
        if parallel.is_main:
            save_weights(folder / MODEL_FILE, weights)

    def write_averaged_weights(folder: Path) -> None:
        with ema.swapped():
            weights = plan.full_state()
            if parallel.is_main:
                save_weights(folder / EMA_FILE, weights)

    def write_plan(folder: Path) -> None:
        plan.save(folder / STATE_FOLDER, ema.state_dict()["shadow"] if ema is not None else {})

    def write_rank(folder: Path) -> None:
        mine = {"random": _random_state(parallel.device), "loader": loader.state_dict(), "means": means.state_dict()}
        torch.save(mine, folder / f"rank_{parallel.rank:05d}.pt")

    return [write_weights, *([write_averaged_weights] if ema is not None else []), write_plan, write_rank]


def read_state(
    folder: Path,
    plan: Plan,
    ema: EMA | None,
    loader: object,
    means: WeightedMeans,
    parallel: Parallel,
    *,
    micro_size: int,
    seed: int,
) -> dict:
    """Restores what ``state_stages`` wrote and returns the manifest's ``trainer`` entry.

    On another number of processes the data position follows from the step, and dropout draws from a new stream.

    Raises: CheckpointError if the checkpoint fits neither the model nor the plan.
    """
    manifest = read_manifest(folder)
    saved = manifest["trainer"]
    if (ema is not None) != saved["has_ema"]:
        raise CheckpointError(
            f"{folder} was saved {'with' if saved['has_ema'] else 'without'} a moving average of the weights; set "
            "ema_decay as it was then, or choose a new run_dir."
        )
    averaged = ema.state_dict()["shadow"] if ema is not None else {}
    plan.load(folder / STATE_FOLDER, averaged, saved)
    if ema is not None:
        ema.num_updates = saved["ema_updates"]
    files = [folder / f"rank_{rank:05d}.pt" for rank in range(saved["world_size"])]
    if (saved["world_size"], saved["micro_size"]) == (parallel.world_size, micro_size):
        mine = _read_rank(files[parallel.rank])
        loader.load_state_dict(mine["loader"])
        means.load_state_dict(mine["means"])
        _set_random_state(mine["random"], parallel.device)
    else:
        logger.warning(
            "%s was saved by %d processes and continues on %d: dropout draws from new random streams",
            folder, saved["world_size"], parallel.world_size,
        )  # fmt: skip
        loader.seek(manifest["step"])
        if parallel.is_main:
            means.load_state_dict(merge(_read_rank(file)["means"] for file in files))
        torch.manual_seed(derive_seed(seed, "dropout", parallel.rank, manifest["step"]))
    return saved


def _read_rank(path: Path) -> dict:
    # unpickled only from the run's own folder, after its manifest was verified: loaders keep objects of their own here
    return torch.load(path, map_location="cpu", weights_only=False)


def _random_state(device: torch.device) -> dict:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
