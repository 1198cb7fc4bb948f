"""From options to a folder of generated networks: the requests, the networks, their files and their tests."""

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.conversion import from_config
from common.errors import ConfigError
from common.parallel import Parallel
from common.provenance import collect
from rpg.generated_files import GeneratedFolder
from rpg.generation import check_requests, generate, network_seed
from rpg.generation_config import GenerateConfig
from rpg.image_condition import build_image_encoder, image_condition, list_images, read_image
from rpg.loading import LoadedGenerator, load_generator
from rpg.requests import (
    Condition,
    Request,
    build_requests,
    check_condition,
    feature_conditions,
    safe_label,
    task_conditions,
    vector_conditions,
)
from rpg.sampling import SamplerConfig
from rpg.tasks import NUM_CLASSES
from rpg.testing import Tester, TesterSection, build_tester
from rpg.text_condition import TextEncoder, text_condition

DEFAULT_NETWORKS = 10  # without a condition; with conditions, one each

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        records: a line of ``networks.jsonl`` per network.
        seconds: wall time of drawing and writing.
        evaluations: of the denoiser per token.
    """

    folder: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    evaluations: int = 0

    def summary(self) -> str:
        """One line: how many, how long, how good."""
        count = len(self.records)
        each = self.seconds / max(count, 1)
        text = (
            f"{count} network{'' if count == 1 else 's'} in {self.seconds:.1f} s ({each:.2f} s each, "
            f"{self.evaluations} evaluations), in {self.folder}"
        )
        accuracies = [record["accuracy"] for record in self.records if record.get("accuracy") is not None]
        if accuracies:
            error = statistics.stdev(accuracies) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else math.nan
            spread = "" if math.isnan(error) else f" ± {error:.4f}"
            text += (
                f"; accuracy {statistics.fmean(accuracies):.4f}{spread} "
                f"(min {min(accuracies):.4f}, max {max(accuracies):.4f})"
            )
        failed = sum(record.get("error") is not None for record in self.records)
        return text + (f"; {failed} test{'' if failed == 1 else 's'} failed" if failed else "")


def generate_networks(config: GenerateConfig, parallel: Parallel | None = None) -> Generation:
    """Generates what ``config`` asks for; the main process writes and tests.

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair, before the first network.
    """
    parallel = parallel or Parallel(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = torch.device(config.device) if config.device else parallel.device
    loaded = load_generator(
        config.generator, device, use_ema=config.ema, structure=config.structure, num_heads=config.num_heads
    )
    conditions = build_conditions(config, loaded, device)
    return write_networks(config, loaded, conditions, parallel)


def write_networks(
    config: GenerateConfig, loaded: LoadedGenerator, conditions: Sequence[Condition] | None, parallel: Parallel
) -> Generation:
    """The networks of these conditions (None: unconditional) in ``config.output``."""
    sampler = sampler_of(config, loaded)
    folder = GeneratedFolder(
        config.output,
        config.tag or safe_label(loaded.facts.tag, also="_"),
        config.format,
        overwrite=config.overwrite,
        adapter_config=loaded.facts.adapter_config,
    )
    labels = [condition.label for condition in conditions or []] or [""]
    # the main process looks before any other can find what it wrote
    first = parallel.from_main(folder.next_indices(labels) if config.append and parallel.is_main else None)
    requests = build_requests(
        conditions,
        config.num_generated or (DEFAULT_NETWORKS if conditions is None else 1),
        seed=config.seed,
        states=config.states,
        groups=loaded.groups,
        first=first,
    )
    check_requests(loaded, requests, sampler)
    if parallel.is_main:
        folder.check(requests)
    tester = build_tester(tester_section(config, loaded)) if config.test and parallel.is_main else None
    started = time.perf_counter()
    drawn = generate(
        loaded,
        requests,
        sampler,
        seed=config.seed,
        rows_per_pass=config.rows_per_pass,
        parallel=parallel,
        precision=config.precision,
    )
    records = []
    hidden = None if config.progress and parallel.is_main else True  # None: shown on a terminal only
    for request, state in tqdm(drawn, total=len(requests), unit="network", disable=hidden, leave=False):
        facts = describe_network(config, loaded, sampler, request)
        path = folder.write(request, state, facts)
        records.append({"file": path.name, **facts})
    seconds = time.perf_counter() - started
    evaluations = 1 if loaded.config.head == "mse" else sampler.evaluations(loaded.config.diffusion_steps)
    generation = Generation(folder.folder, records, seconds, evaluations)
    if parallel.is_main:
        folder.record(records)  # before the tests, which may take long
        if tester is not None:
            _test(folder, records, tester)
        folder.describe(
            {
                "networks": len(records),
                "seconds": round(seconds, 3),
                "evaluations": evaluations,
                "config_sha256": config.settings(),
                "generator_sha256": loaded.digest,
                "sampling": asdict(sampler),
                **collect(seed=config.seed),
                "options": asdict(config),
            }
        )
    parallel.barrier()
    return generation


def sampler_of(config: GenerateConfig, loaded: LoadedGenerator) -> SamplerConfig:
    """The run's sampler with what ``sampling.*`` changes."""
    sampler = config.sampling.over(loaded.sampler)
    if sampler.guidance != 1 and not loaded.facts.condition_dropout:
        logger.warning(
            "sampling.guidance=%g: this generator was trained without training.drop_condition, so what it makes "
            "without a condition is not trained",
            sampler.guidance,
        )
    return sampler


def tester_section(config: GenerateConfig, loaded: LoadedGenerator) -> TesterSection:
    """The tester that is asked for, or the run's.

    Raises: ConfigError if there is neither.
    """
    if config.tester.kind != "none":
        return config.tester
    if loaded.facts.tester is None:
        raise ConfigError(
            "test=true, but neither tester.kind is set nor did the generator's run have one; set tester.kind=python "
            "with tester.target=module:Class, or tester.kind=command with tester.command."
        )
    return from_config(TesterSection, loaded.facts.tester, "tester")


def describe_network(
    config: GenerateConfig, loaded: LoadedGenerator, sampler: SamplerConfig, request: Request
) -> dict[str, Any]:
    """What a network's file says about it."""
    return {
        "index": request.index,
        "label": request.label,
        "seed": config.seed,
        "network_seed": network_seed(config.seed, request),
        "state": request.state,
        "group": None if request.state is None else loaded.groups[request.state],
        "condition": None if request.condition is None else list(request.condition),
        "sampling": asdict(sampler),
        "config_sha256": config.settings(),
        "generator_sha256": loaded.digest,
        "git_revision": collect()["git_revision"],
    }


def _test(folder: GeneratedFolder, records: list[dict[str, Any]], tester: Tester) -> None:
    for record in records:
        result = tester.test(folder.folder / record["file"])
        record |= {"loss": result.loss, "accuracy": result.accuracy, "error": result.error}
        print(f"{record['file']}: {result}")
        if result.error is not None and result.output:
            logger.warning("output of the failed test of %s:\n%s", record["file"], result.output.rstrip()[-2000:])
    folder.record(records)


# ---------------------------------------------------------------- conditions


def build_conditions(
    config: GenerateConfig, loaded: LoadedGenerator, device: torch.device | str = "cpu"
) -> list[Condition] | None:
    """The conditions that ``config`` asks for; None for an unconditional generator.

    Raises: ConfigError if the generator needs a condition and there is none, takes none, or takes another one.
    """
    size = loaded.config.condition_size if loaded.config.condition != "none" else 0
    given = next((name for name in ("tasks", "vectors", "images", "texts", "features") if _has(config, name)), None)
    if not size:
        if given is not None:
            raise ConfigError(f"{given} is a condition, but this generator is unconditional; leave it out.")
        return None
    if given is None:
        ways = "tasks=unseen, vectors=[...]" if size == NUM_CLASSES else f"vectors=[{size} numbers]"
        raise ConfigError(
            f"this generator is conditional ({size} numbers); give {ways}, images, texts or features=FILE.json."
        )
    if given == "tasks":
        if size != NUM_CLASSES:
            raise ConfigError(f"tasks are class vectors of {NUM_CLASSES} bits, but the generator takes {size} numbers.")
        trained = loaded.facts.tasks or None
        return task_conditions(config.tasks, num_tasks=config.num_tasks, trained=trained, seed=config.seed)
    if given == "vectors":
        return vector_conditions(config.vectors, size)
    if given == "features":
        return feature_conditions(config.features, size)
    made = _text_conditions(config, device) if given == "texts" else _image_conditions(config, device)
    return [
        Condition(check_condition(list(condition.values), size, f"encoder={config.encoder}"), condition.label)
        for condition in made
    ]


def _has(config: GenerateConfig, name: str) -> bool:
    return getattr(config, name) is not None


def _image_conditions(config: GenerateConfig, device: torch.device | str) -> list[Condition]:
    """One condition of a list of files or a folder, or one of each folder in a list of folders."""
    encoder = build_image_encoder(config.encoder, device)
    places = [Path(place) for place in ([config.images] if isinstance(config.images, str) else list(config.images))]
    if places and all(place.is_dir() for place in places):
        sets: Mapping[str, list[Path]] = {place.name: list_images(place) for place in places}
    else:
        sets = {"images": places}
    return [
        Condition(tuple(image_condition(encoder, [read_image(path) for path in paths]).tolist()), safe_label(name))
        for name, paths in sets.items()
    ]


def _text_conditions(config: GenerateConfig, device: torch.device | str) -> list[Condition]:
    encoder = TextEncoder(config.encoder, device)
    sentences = [config.texts] if isinstance(config.texts, str) else list(config.texts)
    return [Condition(tuple(text_condition(encoder, str(text)).tolist()), safe_label(str(text))) for text in sentences]
