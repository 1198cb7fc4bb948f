"""Tests of single files and of folders of checkpoints by any tester: a line each, a table, the mean."""

import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.conversion import from_config
from common.errors import ConfigError, DataError
from rpg.adapters import is_adapter_folder
from rpg.checkpoint_files import find_checkpoints, read_checkpoint
from rpg.tasks import NUM_CLASSES, task_in_name
from rpg.testing import Tester, TesterSection, TestResult
from rpg.zoo.recipes import Recipe
from rpg.zoo.testers import collection_tester, tester_section


@dataclass(frozen=True, kw_only=True)
class TestNetworkConfig:
    """Options of ``python -m rpg.test_network``."""

    __test__ = False

    path: str  # checkpoint file, adapter folder, or a folder of them
    recipe: dict[str, Any] = field(default_factory=dict)  # whose tester is used; its name is null if none is chosen
    collection: str | None = None  # folder of a collection, whose tester is used; without all of these: that of path
    tester: TesterSection = field(default_factory=TesterSection)
    detail: bool = False  # also the accuracy on the test examples of each class
    output: str | None = None  # write the results into this .csv file
    overwrite: bool = False  # replace it if it is there

    def __post_init__(self) -> None:
        chosen = [self.recipe.get("name") is not None, self.collection is not None, self.tester.kind != "none"]
        if sum(chosen) > 1:
            raise ConfigError("recipe, collection and tester.kind choose a tester each; give one of them.")
        if self.output is not None and Path(self.output).exists() and not self.overwrite:
            raise ConfigError(f"output={self.output} exists; add overwrite=true or choose another file.")


def find_networks(path: str) -> list[Path]:
    """The file, the adapter, or all checkpoints of the folder.

    Raises: DataError if there is none.
    """
    place = Path(path)
    if not place.exists():
        raise DataError(f"path={path} does not exist; give a checkpoint or a folder of checkpoints.")
    if place.is_file() or is_adapter_folder(place):
        return [place]
    found = find_checkpoints(place)
    if not found:
        raise DataError(f"path={path} holds no checkpoint (.pth, .safetensors or an adapter's folder).")
    return found


def find_tester(config: TestNetworkConfig) -> TesterSection:
    """The tester of the options, else that of the collection in which the path lies.

    Raises: ConfigError if there is none.
    """
    if config.tester.kind != "none":
        return config.tester
    if config.recipe.get("name") is not None:
        recipe = from_config(Recipe, config.recipe, "recipe")
        section = tester_section(recipe, "")
        if recipe.method == "adapters":
            options = {"adapters": config.recipe["adapters"]}
        else:
            options = {"recipe": config.recipe} if "collection" in section.options else section.options
        return TesterSection(kind="python", target=section.target, options=options)
    found = collection_tester(config.path if config.collection is None else config.collection)
    if found is not None:
        return found
    if config.collection is not None:
        raise ConfigError(f"collection={config.collection} is no collection that knows a tester; set tester.*.")
    raise ConfigError(
        "no tester is chosen; add recipe=NAME, collection=DIR, or tester.kind=python tester.target=MODULE:CLASS, or "
        'tester.kind=command \'tester.command=["{python}",test.py,"{path}"]\'.'
    )


def test_networks(paths: Sequence[Path], tester: Tester) -> Iterator[tuple[Path, TestResult]]:
    """The result of every network, as it comes."""
    for path in paths:
        yield path, tester.test(path)


test_networks.__test__ = False  # no test case


def accuracy_per_class(path: Path, tester: Tester) -> list[float]:
    """Share of right answers among the test examples of each of the ten original classes.

    Raises: ConfigError for testers that do not know the classes.
    """
    classes_N = tester.classes_N
    if classes_N is None:
        raise ConfigError("detail=true needs a tester in Python with classes_N, the class of every test example.")
    predicted_N, target_N = tester.predict(read_checkpoint(path), task=task_in_name(path))
    right_N = (predicted_N == target_N).double()
    count = max(NUM_CLASSES, int(classes_N.max()) + 1)
    return [float(right_N[classes_N == c].mean()) if (classes_N == c).any() else math.nan for c in range(count)]


def class_names(tester: Tester, count: int) -> list[str]:
    """As the tester calls them, else numbers."""
    return list(tester.class_names or (f"class {c}" for c in range(count)))


def write_results(path: Path, results: Sequence[tuple[Path, TestResult]]) -> None:
    """A CSV with a row per network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["network", "task", "loss", "accuracy", "seconds", "error"])
        for network, result in results:
            facts = (result.loss, result.accuracy, f"{result.seconds:.3f}", result.error)
            writer.writerow([network.name, task_in_name(network), *facts])


def mean_line(results: Sequence[tuple[Path, TestResult]]) -> str:
    """Mean accuracy with its standard error, and how many tests failed."""
    values = [result.accuracy for _, result in results if result.accuracy is not None]
    failed = sum(result.error is not None for _, result in results)
    text = f"{len(results)} networks"
    if values:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        text += f"; accuracy {statistics.fmean(values):.4f} +- {error:.4f}, {min(values):.4f} to {max(values):.4f}"
    return text + (f"; {failed} failed" if failed else "")
