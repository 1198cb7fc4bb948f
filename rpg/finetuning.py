"""Fine-tuning from a generated network: is it a good start?

The network is trained along a recipe; next to it, if wanted, the same training from random weights. Accuracy on the
test images is taken before the first epoch and after each.
"""

import csv
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common import provenance
from common.checkpoint import write_json
from common.config import require_at_least
from common.errors import ConfigError, DataError
from rpg.checkpoint_files import read_checkpoint, write_checkpoint
from rpg.tasks import focal_loss, require_task, task_in_name, task_targets
from rpg.zoo.classifiers import TestImages, Training, compute_logits
from rpg.zoo.image_data import load_split
from rpg.zoo.networks import State, build_network
from rpg.zoo.recipes import Recipe
from rpg.zoo.testers import load_strictly

RESULTS_FILE, CURVE_FILE = "results.json", "curve.csv"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Options of ``python -m rpg.finetune``."""

    recipe: Recipe
    network: str  # file of the network to start from
    output: str  # folder of results.json, curve.csv and the trained network
    task: int | None = None  # of task networks; null: the one in the file's name
    base: str | None = None  # rest of the network, of recipes that collect only some tensors
    compare_random: bool = True  # also train from random weights
    device: str | None = None  # null: the GPU if there is one
    overwrite: bool = False  # replace results that are there

    def __post_init__(self) -> None:
        if self.task is not None:
            require_task(self.task)
        if self.recipe.method == "adapters":
            raise ConfigError(f"recipe={self.recipe.name} is for adapters; choose a recipe of classifiers.")
        require_at_least("recipe.training.epochs", self.recipe.training.epochs, 1)


@dataclass(frozen=True)
class Point:
    """Accuracy (0 to 1) and loss (nats) on the test images after ``epoch`` epochs; loss of training, too."""

    start: str
    epoch: int
    test_accuracy: float
    test_loss: float
    train_loss: float | None = None


def finetune(config: FinetuneConfig) -> list[Point]:
    """Runs the trainings and writes ``results.json``, ``curve.csv`` and ``finetuned.safetensors``.

    Raises: ConfigError if the task is not known or results are there already; DataError for a file that is no network
        of the recipe.
    """
    output = Path(config.output)
    if (output / RESULTS_FILE).exists() and not config.overwrite:
        raise ConfigError(f"output={output} holds results; add overwrite=true or choose another folder.")
    task = _task(config)
    state = read_checkpoint(config.network)
    base = None if config.base is None else read_checkpoint(config.base)
    starts: dict[str, tuple[State | None, State | None]] = {Path(config.network).stem: (state, base)}
    if config.compare_random:
        starts["random weights"] = (None, None)
    points: list[Point] = []
    for number, (name, (weights, rest)) in enumerate(starts.items()):
        run, trained = _train(config, name, weights, rest, task)
        points += run
        if number == 0:
            target = output / "finetuned.safetensors"
            write_checkpoint(target, trained, "safetensors", {"from": Path(config.network).name}, overwrite=True)
    _write(config, points, task)
    return points


def _task(config: FinetuneConfig) -> int | None:
    if config.recipe.condition.kind != "class":
        return None
    task = config.task if config.task is not None else task_in_name(config.network)
    if task is None:
        raise ConfigError(
            f"recipe={config.recipe.name} trains networks of tasks, and network={config.network} does not say which "
            "(..._class0279...); add task=1..1022."
        )
    return task


def _train(
    config: FinetuneConfig, name: str, weights: State | None, base: State | None, task: int | None
) -> tuple[list[Point], State]:
    recipe, section = config.recipe, config.recipe.training
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    plain = type(recipe.network)(**{**vars(recipe.network), "pretrained": False, "weights": None})
    network = build_network(plain, recipe.seed)
    if weights is not None:
        load_strictly(network, weights, base, recipe)
    training = Training(
        network,
        section,
        load_split(recipe.data, "train"),
        seed=recipe.seed,
        task=task,
        num_workers=recipe.data.num_workers,
        device=device,
        frozen_norms=bool(recipe.network.trainable),
    )
    images = load_split(recipe.data, "test")
    test = TestImages(images, num_workers=recipe.data.num_workers)
    target_N = images.label_N if task is None else task_targets(images.label_N, task)

    def point(epoch: int, train_loss: float | None = None) -> Point:
        logits_NC = compute_logits(network, test, device)
        accuracy = float((logits_NC.argmax(dim=-1) == target_N).double().mean())
        focal = section.loss == "focal"
        cross_entropy = torch.nn.functional.cross_entropy
        loss = focal_loss(logits_NC, target_N, section.gamma) if focal else cross_entropy(logits_NC, target_N)
        if not torch.isfinite(loss):
            raise DataError(f"{name}: the loss is {float(loss)} after {epoch} epochs; check the network, or lower lr.")
        print(f"{name}: epoch {epoch}, loss {float(loss):.4f}, accuracy {accuracy:.4f}", file=sys.stderr, flush=True)
        return Point(name, epoch, accuracy, float(loss), train_loss)

    points = [point(0)]
    while training.epoch < training.epochs:
        losses = list(training.run())
        points.append(point(training.epoch, sum(losses) / len(losses)))
    return points, {key: value.detach().cpu() for key, value in network.state_dict().items()}


def _write(config: FinetuneConfig, points: list[Point], task: int | None) -> None:
    output = Path(config.output)
    with (output / CURVE_FILE).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(asdict(points[0])))
        writer.writeheader()
        writer.writerows(asdict(one) for one in points)
    facts = {
        **provenance.collect(seed=config.recipe.seed),
        "network": config.network,
        "task": task,
        "recipe": asdict(config.recipe),
        "points": [asdict(one) for one in points],
    }
    write_json(output / RESULTS_FILE, facts)


def summary(points: list[Point]) -> str:
    """A line per start: accuracy before, after one epoch, best, and at the end."""
    lines = []
    for name in dict.fromkeys(point.start for point in points):
        run = [point for point in points if point.start == name]
        best = max(run, key=lambda point: point.test_accuracy)
        lines.append(
            f"{name}: accuracy {run[0].test_accuracy:.4f} before, {run[1].test_accuracy:.4f} after one epoch, "
            f"{run[-1].test_accuracy:.4f} after {run[-1].epoch} (best {best.test_accuracy:.4f} after {best.epoch})"
        )
    return "\n".join(lines)
