"""Collections of checkpoints: every training of a recipe, resumable, several at a time.

``output/`` holds the checkpoints by the names of ``rpg.tasks`` (task sets: ``checkpoint_train/`` and, for the held-out
tasks, ``checkpoint_test/``), ``collection.json`` (recipe, tester, seed, source revision) and the hidden
``.collection/`` with what an interrupted training continues from. A training is claimed by a file lock, so that several
processes, or several machines on a shared file system, may work on one collection.
"""

import contextlib
import json
import logging
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from common import provenance
from common.checkpoint import write_json
from common.conversion import from_config
from common.errors import CheckpointError, ConfigError
from rpg.checkpoint_files import read_checkpoint, write_checkpoint
from rpg.collection_config import CollectConfig
from rpg.lora_collection import collect_adapters
from rpg.tasks import CheckpointName, parse_name, task_targets
from rpg.zoo import digit_tasks, digits
from rpg.zoo.classifiers import StateFile, TestImages, Training, compute_logits, train_and_save
from rpg.zoo.image_data import load_split
from rpg.zoo.networks import State, build_network
from rpg.zoo.recipes import Recipe
from rpg.zoo.testers import BASE_FILE, RECORD_FILE, WORK_FOLDER, read_record, tester_section

FORMAT = 1
SEVERAL_FOLDERS = ("checkpoint_train", "checkpoint_test")
NO_RESULT = ("num_workers", "download", "root", "watch", "poll_seconds", "idle_seconds", "micro_size")
"""Options that may differ between two commands that add to one collection."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One training: of all networks (value None), of a task, of a seed; digit tasks are trained together."""

    name: str
    value: int | None = None


@dataclass(frozen=True)
class Collected:
    """What a collection holds now.

    Attributes:
        accuracies: of all checkpoints, as their names say.
        elsewhere: names of trainings that another process is working on.
    """

    folder: Path
    accuracies: tuple[float, ...]
    elsewhere: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line."""
        count = len(self.accuracies)
        known = [value for value in self.accuracies if math.isfinite(value)]
        text = f"{count} checkpoint{'' if count == 1 else 's'} in {self.folder}"
        if known:
            error = f" +- {statistics.stdev(known) / math.sqrt(len(known)):.4f}" if len(known) > 1 else ""
            text += f"; accuracy {statistics.fmean(known):.4f}{error} (mean and standard error), "
            text += f"{min(known):.4f} to {max(known):.4f}"
        if self.elsewhere:
            text += f"; still at work elsewhere: {', '.join(self.elsewhere)}"
        return text


def collect(config: CollectConfig) -> Collected:
    """Runs every training of the recipe that is not finished, and says what there is.

    Raises: ConfigError if the folder holds a collection of another recipe; DataError for images that are missing.
    """
    recipe, output = config.recipe, Path(config.output)
    open_collection(config)
    if recipe.method == "adapters":
        collect_adapters(recipe, output, device=config.device, progress=_reporter(config, "adapters"))
        return Collected(output, accuracies(output))
    waiting = [job for job in plan(recipe) if not is_finished(config, job)]
    elsewhere: list[str] = []
    if config.processes == 1 or len(waiting) < 2:
        for slot, job in enumerate(waiting):
            if not run_job(config, job, slot):
                elsewhere.append(job.name)
    else:
        elsewhere = _run_in_processes(config, waiting)
    return Collected(output, accuracies(output), tuple(elsewhere))


def plan(recipe: Recipe) -> list[Job]:
    """The trainings of a recipe."""
    values = recipe.condition.resolve()
    if recipe.method == "digits_tasks":
        return [Job("tasks")]
    if values == (None,):
        return [Job("training")]
    return [Job(f"{recipe.condition.kind}{value:04d}", value) for value in values]


def open_collection(config: CollectConfig) -> None:
    """Makes the folder one of this recipe.

    Raises: ConfigError if it holds something else.
    """
    output, recipe = Path(config.output), config.recipe
    record = output / RECORD_FILE
    if record.is_file():
        work = work_folder(config)
        begun = accuracies(output) or (work.is_dir() and any(path.suffix != ".lock" for path in work.iterdir()))
        differs = _difference(read_record(output)["recipe"], asdict(recipe)) if begun else None
        if differs:
            option, old, new = differs
            raise ConfigError(
                f"output={output} holds a collection with recipe.{option}={old}, now it is {new}; choose another "
                "folder, or the options of before to continue it."
            )
    elif output.is_dir() and any(path.name != WORK_FOLDER for path in output.iterdir()):
        raise ConfigError(
            f"output={output} exists and is no collection (there is no {RECORD_FILE}); choose a new folder."
        )
    work_folder(config).mkdir(parents=True, exist_ok=True)
    facts = {
        "format": FORMAT,
        **provenance.collect(seed=recipe.seed),
        "recipe": asdict(recipe),
        "tester": asdict(tester_section(recipe, output)),
    }
    with FileLock(work_folder(config) / "record.lock"):  # several processes may open the collection at once
        write_json(record, facts)


def _difference(before: Any, after: Any, path: str = "") -> tuple[str, object, object] | None:
    """First option that decides a checkpoint and differs; more tasks or seeds may be added."""
    leaf = path.rpartition(".")[2]
    if leaf in NO_RESULT or path == "condition.values":
        return None
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            inner = f"{path}.{key}" if path else key
            if found := _difference(before.get(key), after.get(key), inner):
                return found
        return None
    if json.loads(json.dumps(before)) != json.loads(json.dumps(after)):
        return path, before, after
    return None


def work_folder(config: CollectConfig) -> Path:
    """Hidden folder with the states of trainings and the marks of finished ones."""
    return Path(config.output) / WORK_FOLDER


def folder_of(config: CollectConfig, value: int | None) -> Path:
    """Where checkpoints of a task or seed go."""
    output, condition = Path(config.output), config.recipe.condition
    if condition.kind != "class" or not condition.held_out:
        return output
    return output / SEVERAL_FOLDERS[value in condition.held_out]


def accuracies(output: Path) -> tuple[float, ...]:
    """Of all checkpoints below ``output``, from their names."""
    names = (parse_name(path) for folder in (output, *(output / name for name in SEVERAL_FOLDERS))
             for path in (sorted(folder.iterdir()) if folder.is_dir() else ()) if path.suffix != ".json")  # fmt: skip
    return tuple(name.accuracy for name in names if name is not None)


def _mark(config: CollectConfig, job: Job) -> Path:
    return work_folder(config) / f"{job.name}.json"


def is_finished(config: CollectConfig, job: Job) -> bool:
    """Whether all checkpoints of a training are there."""
    try:
        done = json.loads(_mark(config, job).read_text())
    except (OSError, ValueError):
        return False
    tasks = set(done["tasks"])
    wanted = config.recipe.condition.resolve() if config.recipe.method == "digits_tasks" else ()
    return tasks >= set(wanted) and all((Path(config.output) / name).exists() for name in done["files"])


# ------------------------------------------------------------------------------------------------------------ running


def _run_in_processes(config: CollectConfig, jobs: Sequence[Job]) -> list[str]:
    """Several trainings at a time; the first error ends all of them, and what they had is continued next time."""
    elsewhere = []
    processes = min(config.processes, len(jobs))
    threads = max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")
    if config.recipe.prepare is not None:
        run_preparation(config, 0)  # once, before the trainings that start from it
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,)) as pool:
        running = {pool.submit(run_job, config, job, slot): job for slot, job in enumerate(jobs)}
        try:
            for future in as_completed(running):
                if not future.result():
                    elsewhere.append(running[future].name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    return sorted(elsewhere)


def run_job(config: CollectConfig, job: Job, slot: int) -> bool:
    """One training; False if another process has it.

    Args:
        slot: number of the training, by which GPUs are dealt out.
    """
    with _claimed(work_folder(config) / f"{job.name}.lock") as ours:
        if not ours:
            return False
        if is_finished(config, job):
            return True
        device = _device(config, slot)
        if config.recipe.method == "classifier":
            run_preparation(config, slot)
            files, tasks = _train_classifier(config, job, device), []
        else:
            files, tasks = _train_digits(config, job)
        write_json(_mark(config, job), {"files": files, "tasks": tasks})
    return True


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _device(config: CollectConfig, slot: int) -> str:
    if config.device is not None:
        return config.device
    return f"cuda:{slot % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def _reporter(config: CollectConfig, name: str):
    def report(line: str) -> None:
        if config.progress:
            print(f"{name}: {line}", file=sys.stderr, flush=True)

    return report


def _save(config: CollectConfig, name: CheckpointName, state: State) -> str:
    """Writes one checkpoint in the place of one of the same number that an interrupted training left."""
    folder = folder_of(config, name.value)
    suffix = ".pth" if config.format == "pth" else ".safetensors"
    path = folder / name.file_name(suffix)
    write_checkpoint(path, state, config.format, overwrite=True)
    stem = str(replace(name, accuracy=0.0)).split("_acc0.0000", 1)
    for old in folder.glob(f"{stem[0]}_acc*{stem[1]}.*"):
        if old != path and old.suffix in (".pth", ".safetensors") and parse_name(old) is not None:
            old.unlink()
    return path.relative_to(config.output).as_posix()


def _train_digits(config: CollectConfig, job: Job) -> tuple[list[str], list[int]]:
    recipe, tag = config.recipe, config.recipe.file_tag
    options = {"num_checkpoints": recipe.saving.count, **recipe.digits}
    if recipe.method == "digits_tasks":
        tasks = list(recipe.condition.resolve())
        how = _section(digit_tasks.DigitTaskRecipe, options)
        named = digit_tasks.named_networks(tasks, recipe.seed, how, tag=tag)
    else:
        tasks = []
        seed = recipe.seed if job.value is None else job.value
        how = _section(digits.DigitRecipe, options)
        named = digits.named_networks(seed, how, tag=tag, by_seed=job.value is not None)
    return [_save(config, name, state) for name, state in named], tasks


def _section(kind: type, options: dict[str, Any]) -> Any:
    return from_config(kind, options, "recipe.digits")


def _train_classifier(config: CollectConfig, job: Job, device: str) -> list[str]:
    """One training of a classifier; returns its files."""
    recipe, kind = config.recipe, config.recipe.condition.kind
    report = _reporter(config, job.name)
    seed = job.value if kind == "seed" else recipe.seed
    task = job.value if kind == "class" else None
    train, images = load_split(recipe.data, "train"), load_split(recipe.data, "test")
    network = build_network(recipe.network, seed)
    if recipe.prepare is not None:
        network.load_state_dict(read_checkpoint(work_folder(config) / BASE_FILE), strict=True)
    training = Training(
        network,
        recipe.training,
        train,
        seed=seed,
        task=task,
        num_workers=recipe.data.num_workers,
        device=device,
        frozen_norms=bool(recipe.network.trainable),
    )
    test = TestImages(images, num_workers=recipe.data.num_workers)
    target_N = images.label_N if task is None else task_targets(images.label_N, task)
    state_file = StateFile(work_folder(config) / f"{job.name}.pt", config.state_interval_seconds)

    def save(number: int, state: State) -> None:
        predicted_N = compute_logits(network, test, device).argmax(dim=-1)
        accuracy = float((predicted_N == target_N).double().mean())
        name = CheckpointName(number, accuracy, recipe.file_tag, None if kind == "none" else kind, job.value)
        report(f"checkpoint {number} of {recipe.saving.count}: accuracy {accuracy:.4f}")
        _save(config, name, state)

    train_and_save(training, recipe, save, state_file=state_file, progress=report)
    state_file.remove()
    whole = CheckpointName(0, 0.0, recipe.file_tag, None if kind == "none" else kind, job.value)
    ending = str(whole).split("_acc0.0000", 1)[1]
    folder = folder_of(config, job.value)
    found = [path for path in sorted(folder.iterdir()) if path.stem.endswith(ending) and parse_name(path)]
    if kind == "none":
        found = [path for path in found if parse_name(path).condition is None]
    return [path.relative_to(config.output).as_posix() for path in found]


def run_preparation(config: CollectConfig, slot: int) -> None:
    """Trains the whole network once, of recipes that collect a part of it; the others wait for it here.

    Raises: CheckpointError if the base network was removed while checkpoints that belong to it are there.
    """
    recipe = config.recipe
    base = work_folder(config) / BASE_FILE
    if recipe.prepare is None or base.is_file():
        return
    with FileLock(base.with_suffix(".lock")):
        if base.is_file():
            return
        if accuracies(Path(config.output)):
            raise CheckpointError(f"{base} is gone, to which the checkpoints belong; collect into a new folder.")
        device, report = _device(config, slot), _reporter(config, "base network")
        images = load_split(recipe.data, "train")
        network = build_network(replace(recipe.network, trainable=[]), recipe.seed)
        training = Training(
            network,
            recipe.prepare,
            images,
            seed=recipe.seed,
            num_workers=recipe.data.num_workers,
            device=device,
        )
        state_file = StateFile(base.with_suffix(".pt"), config.state_interval_seconds)
        if found := state_file.read():
            training.load_state(found)
        while training.epoch < training.epochs:
            losses = list(training.run())
            report(f"epoch {training.epoch} of {training.epochs}: loss {statistics.fmean(losses):.4f}")
            state_file.write(training.state)
        write_checkpoint(base, {name: value.cpu() for name, value in network.state_dict().items()}, "safetensors")
        state_file.remove()
