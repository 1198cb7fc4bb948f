"""What ``python -m mup_dit.evaluate`` does: metrics of samples, alone or against a reference.

``work_dir/results.json`` holds numbers with standard errors where they have one, options, seed and revision;
``clip_scores.csv`` and ``geneval.jsonl`` hold single images. Neither the batch size nor the number of processes changes
a result, apart from the order of float64 sums.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import write_json
from common.errors import ConfigError, DataError
from common.evaluation.metric import Metric
from common.parallel import Parallel
from common.provenance import collect
from common.report.tables import Table, print_tables
from mup_dit.evaluation_config import EvaluateConfig
from mup_dit.geneval.colours import ColourClassifier
from mup_dit.geneval.mask2former import Mask2FormerDetector
from mup_dit.geneval.scoring import find_prompts, score_folder, write_records
from mup_dit.image_files import replace_whole
from mup_dit.metrics.clip import Clip
from mup_dit.metrics.clip_score import Captions, Score, score_batch, summarize, write_csv
from mup_dit.metrics.collection import Collection, collect_features
from mup_dit.metrics.digit_features import DigitFeatures
from mup_dit.metrics.features import FeatureNetwork
from mup_dit.metrics.frechet import frechet_distance
from mup_dit.metrics.image_sets import Batches, ImageBatch, ImageSet, open_images
from mup_dit.metrics.inception import InceptionFeatures
from mup_dit.metrics.moments import STATISTICS_KEYS, Moments, read_statistics
from mup_dit.metrics.precision_recall import precision_recall

RESULTS = "results.json"
NEEDS = {
    "fid": {"pool"}, "sfid": {"spatial"}, "is": {"score"}, "precision_recall": {"points"}, "clean_fid": {"clean"},
}  # fmt: skip
MOMENTS_OF = {"fid": "pool", "sfid": "spatial", "clean_fid": "clean"}


def evaluate(config: EvaluateConfig, parallel: Parallel) -> dict[str, Any]:
    """Computes the metrics; the main process writes and prints. Returns what the JSON file holds. Collective.

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair.
    """
    if config.device:
        parallel = replace(parallel, device=torch.device(config.device))
    path = Path(config.work_dir) / RESULTS
    check_free(config, path)
    parallel.barrier()
    began = time.perf_counter()
    metrics: list[Metric] = []
    facts: dict[str, Any] = {}
    if config.save_statistics or NEEDS.keys() & set(config.metrics):
        metrics += _with_features(config, parallel, facts)
    if "clip_score" in config.metrics:
        metrics += _clip_score(config, parallel, facts)
    if "geneval" in config.metrics:
        metrics += _geneval(config, parallel, facts)
    found = {
        "metrics": {each.name: {"value": each.value, "standard_error": each.standard_error} for each in metrics},
        **facts,
        "seconds": round(time.perf_counter() - began, 3),
        "processes": parallel.world_size,
        "config": asdict(config),
        **collect(seed=config.seed),
    }
    if parallel.is_main:
        write_json(path, found)
        _print(config, metrics)
    return found


def check_free(config: EvaluateConfig, path: Path) -> None:
    """Makes the folder of results. Raises: ConfigError if results stand there that may not be replaced."""
    for each in (path, *([Path(config.save_statistics)] if config.save_statistics else [])):
        if each.exists() and not config.overwrite:
            raise ConfigError(f"{each} exists; choose another work_dir (or file), or use overwrite=true.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"work_dir={config.work_dir} cannot be made ({error.strerror}); choose a folder you can write to."
        ) from None


class First:
    """The first images of a set."""

    def __init__(self, images: ImageSet, count: int) -> None:
        if count > len(images):
            raise DataError(f"num_samples={count}, but {images.name} holds {len(images)} images; ask for fewer.")
        self.name, self._images, self._count = images.name, images, count

    @property
    def skipped(self) -> list[str]:
        """Files left out so far."""
        return list(getattr(self._images, "skipped", ()))

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int, rank: int = 0, world_size: int = 1) -> Batches:
        for batch in self._images.batches(size, rank, world_size):
            kept = sum(index < self._count for index in batch.indices)
            if kept:
                yield ImageBatch(batch.indices[:kept], batch.images[:kept], batch.files[:kept])
            if kept < len(batch.indices):
                return


def load_samples(config: EvaluateConfig) -> ImageSet:
    """The images that are scored."""
    images = open_images(config.samples, split=config.split, size=config.image_size, on_error=config.on_error)
    return images if config.num_samples is None else First(images, config.num_samples)


# ---------------------------------------------------------------- metrics of features


def _with_features(config: EvaluateConfig, parallel: Parallel, facts: dict[str, Any]) -> list[Metric]:
    samples = load_samples(config)
    wanted = [name for name in NEEDS if name in config.metrics]
    needs = set().union(*(NEEDS[name] for name in wanted))
    stored, reference_images = open_reference(config, needs)
    network = build_features(config, parallel.device)
    of_samples = needs | ({"pool", "spatial"} if config.save_statistics else set())
    sample = _collect(samples, network, of_samples, config, parallel)
    facts |= {"features": network.name, "samples": sample.count} | _skipped(samples, parallel)
    sample_moments = sample.moments()
    if config.save_statistics and parallel.is_main:
        write_statistics(Path(config.save_statistics), sample_moments)
    reference, reference_moments = None, dict(stored)
    if reference_images is not None:
        left = needs - {"score"} - stored.keys()
        reference = _collect(reference_images, network, left, config, parallel)
        facts |= {"reference_images": reference.count} | _skipped(reference_images, parallel, "reference_")
        reference_moments |= reference.moments()
    metrics = []
    for name in wanted:
        if name in MOMENTS_OF:
            kind = MOMENTS_OF[name]
            distance = frechet_distance(sample_moments[kind], reference_moments[kind])
            metrics.append(Metric(network.names[name], distance))
        elif name == "is":
            metrics.append(sample.score.finish(network.names["is"]))
        else:
            metrics += _precision_recall(config, network, sample, reference, parallel)
    return metrics


def open_reference(config: EvaluateConfig, needs: set[str]) -> tuple[dict[str, Moments], ImageSet | None]:
    """Stored moments by kind, and the images that the other metrics need (None if there is no need).

    Raises: DataError if the reference has neither what a metric needs.
    """
    needs = needs - {"score"}
    if not needs:
        return {}, None
    path = Path(config.reference)
    stored: dict[str, Moments] = {}
    if path.suffix == ".npz" and path.is_file():
        found = {kind: read_statistics(path, kind) for kind in STATISTICS_KEYS if kind in needs}
        stored = {kind: moments for kind, moments in found.items() if moments is not None}
    if needs <= stored.keys():
        return stored, None
    left = sorted(needs - stored.keys())
    try:
        images = open_images(
            config.reference,
            option="reference",
            split=config.reference_split or config.split,
            size=config.image_size,
            on_error=config.on_error,
        )
    except DataError as error:
        if not stored:
            raise
        asking = ", ".join(name for name in NEEDS if NEEDS[name] & set(left))
        raise DataError(
            f"reference={path} holds statistics only, but {asking} needs its images (arr_0); leave {asking} out, or "
            "give images."
        ) from error
    return stored, images


def build_features(config: EvaluateConfig, device: torch.device) -> FeatureNetwork:
    """The network that ``features`` names."""
    if config.features == "digits":
        return DigitFeatures(device)
    return InceptionFeatures(config.inception, device)


def _collect(
    images: ImageSet, network: FeatureNetwork, needs: set[str], config: EvaluateConfig, parallel: Parallel
) -> Collection:
    def seen(batches: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        hidden = None if config.progress and parallel.is_main else True  # None: shown on a terminal only
        total = -(-len(images) // (config.batch_size * parallel.world_size))
        return tqdm(batches, desc=Path(images.name).name, total=total, unit="batch", disable=hidden, leave=False)

    return collect_features(
        images,
        network,
        needs,
        batch_size=config.batch_size,
        parallel=parallel,
        split_size=config.split_size,
        clean_size=config.clean_size,
        seen=seen,
    )


def _precision_recall(
    config: EvaluateConfig, network: FeatureNetwork, sample: Collection, reference: Collection, parallel: Parallel
) -> list[Metric]:
    """Computed once, by the main process."""
    found = None
    if parallel.is_main:
        shares = precision_recall(
            sample.points_ND().to(parallel.device),
            reference.points_ND().to(parallel.device),
            k=config.neighbours,
            half_precision=config.half_precision_compat,
        )
        found = [
            replace(shares.precision, name=network.names["precision"]),
            replace(shares.recall, name=network.names["recall"]),
        ]
    return parallel.from_main(found)


def write_statistics(path: Path, moments: dict[str, Moments]) -> None:
    """Moments under the keys of ADM's reference files, and the number of images."""
    arrays = {}
    for kind, (mean_key, covariance_key) in STATISTICS_KEYS.items():
        if kind in moments:
            arrays |= {mean_key: moments[kind].mean_D, covariance_key: moments[kind].covariance_DD}
    count = next(iter(moments.values())).count

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays, count=count)

    replace_whole(path, write)


def _skipped(images: ImageSet, parallel: Parallel, prefix: str = "") -> dict[str, list[str]]:
    """Files left out, over all processes. Collective."""
    everyones = parallel.gather(list(getattr(images, "skipped", ())))
    skipped = sorted({file for part in everyones for file in part})
    return {f"{prefix}skipped_files": skipped} if skipped else {}


# ---------------------------------------------------------------- metrics of single images


def _clip_score(config: EvaluateConfig, parallel: Parallel, facts: dict[str, Any]) -> list[Metric]:
    images = load_samples(config)
    captions = Captions(config.clip.captions, config.samples, images)
    clip = Clip(config.clip.model, parallel.device)
    mine: dict[int, Score] = {}
    hidden = None if config.progress and parallel.is_main else True
    batches = images.batches(config.batch_size, parallel.rank, parallel.world_size)
    for batch in tqdm(batches, desc="clip_score", unit="batch", disable=hidden, leave=False):
        texts = captions.of(batch)
        for index, file, text, value in zip(
            batch.indices, batch.files, texts, score_batch(clip, batch, texts), strict=True
        ):
            mine[index] = Score(file, text, value)
    scores = {index: score for part in parallel.gather(mine) for index, score in part.items()}
    facts |= {"clip_model": clip.source, "clip_images": len(scores)} | _skipped(images, parallel)
    if parallel.is_main:
        write_csv(Path(config.work_dir) / "clip_scores.csv", scores)
    return summarize(scores)


def _geneval(config: EvaluateConfig, parallel: Parallel, facts: dict[str, Any]) -> list[Metric]:
    options = config.geneval
    find_prompts(Path(config.samples))  # what is wrong with the folder shows before networks are loaded
    detector = Mask2FormerDetector(options.detector, parallel.device)
    colours = ColourClassifier(Clip(options.colours, parallel.device, option="geneval.colours"))
    hidden = None if config.progress and parallel.is_main else True

    def seen(prompts: list[int]) -> Iterable[int]:
        return tqdm(prompts, desc="geneval", unit="prompt", disable=hidden, leave=False)

    summary, records = score_folder(
        Path(config.samples),
        detector,
        colours,
        rule=options.rule,
        position_threshold=options.position_threshold,
        settings={"detector": options.detector, "colours": options.colours},
        work_dir=Path(config.work_dir),
        parallel=parallel,
        limit=options.limit,
        seen=seen,
    )
    facts |= {"geneval_images": summary.images, "geneval_prompts": summary.prompts, "detector": detector.name}
    if parallel.is_main:
        replace_whole(Path(config.work_dir) / "geneval.jsonl", lambda path: write_records(path, records))
        print(summary.text())
    return summary.metrics()


def _print(config: EvaluateConfig, metrics: list[Metric]) -> None:
    rows = [[metric.name, metric.value, metric.standard_error] for metric in metrics]
    caption = f"{config.samples}" + (f" against {config.reference}" if config.reference else "")
    print_tables(
        [Table(name="results", columns=["metric", "value", "standard error"], rows=rows, caption=caption, digits=5)]
    )
