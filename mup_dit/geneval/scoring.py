"""GenEval of a folder: one sub-folder per prompt with ``metadata.jsonl`` and ``samples/``.

``python -m mup_dit.sample layout=geneval prompts=evaluation_metadata.jsonl samples_per_prompt=4`` writes such a folder.
Prompts are shared out over processes; those that an interrupted run has judged are not judged again.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from common.errors import DataError
from common.evaluation.partial_results import PartialResults
from common.parallel import Parallel
from mup_dit.geneval.decision import decide
from mup_dit.geneval.detection import Detection, DetectionRule, Detector
from mup_dit.geneval.geometry import POSITION_THRESHOLD
from mup_dit.geneval.prompts import published_sizes, read_metadata
from mup_dit.geneval.summary import Outcome, Summary, summarize
from mup_dit.metrics.image_sets import SUFFIXES

Colours = Callable[[Image.Image, Iterable[Detection], str], list[str]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptFolder:
    """A prompt and its images."""

    folder: Path
    metadata: Mapping[str, Any]
    images: tuple[Path, ...]


def find_prompts(root: Path) -> list[PromptFolder]:
    """The prompts of a folder, by number.

    Raises: DataError if there are none, or one has no images.
    """
    folders = sorted(path.parent for path in root.glob("*/metadata.jsonl"))
    if not folders:
        raise DataError(
            f"samples={root} has no folders with metadata.jsonl; sample with layout=geneval format=png "
            "prompts=evaluation_metadata.jsonl samples_per_prompt=4."
        )
    found = []
    for folder in folders:
        images = tuple(sorted(path for path in folder.glob("samples/*") if path.suffix.lower() in SUFFIXES))
        if not images:
            raise DataError(f"{folder}/samples holds no images; sample again with resume=true.")
        found.append(PromptFolder(folder, read_metadata(folder / "metadata.jsonl")[0], images))
    return found


def score_prompt(
    prompt: PromptFolder,
    detector: Detector,
    colours: Colours,
    rule: DetectionRule,
    position_threshold: float = POSITION_THRESHOLD,
) -> list[dict[str, Any]]:
    """A record for each image: file, decision and the detections it rests on.

    Raises: DataError naming an image that cannot be read.
    """
    images = [_open(path) for path in prompt.images]
    records = []
    for path, image, found in zip(prompt.images, images, detector(images), strict=True):
        kept = rule.apply(found, prompt.metadata["tag"])

        def classify(detections, name, image=image):
            return colours(image, detections, name)

        decision = decide(prompt.metadata, kept, classify, position_threshold=position_threshold)
        records.append(
            {
                "filename": f"{prompt.folder.name}/samples/{path.name}",
                "tag": prompt.metadata["tag"],
                "prompt": prompt.metadata["prompt"],
                "correct": decision.correct,
                "reason": decision.reason,
                "metadata": dict(prompt.metadata),
                "detections": {
                    name: [[*each.box, round(each.score, 5)] for each in objects] for name, objects in kept.items()
                },
            }
        )
    return records


def score_folder(
    root: Path,
    detector: Detector,
    colours: Colours,
    *,
    rule: DetectionRule,
    position_threshold: float,
    settings: Mapping[str, Any],
    work_dir: Path,
    parallel: Parallel,
    limit: int | None = None,
    seen: Callable[[list[int]], Iterable[int]] = iter,
) -> tuple[Summary, list[dict[str, Any]]]:
    """The summary and all records, in order of prompts. Collective.

    Args:
        settings: what decides the records besides images and rule, for partial results.
        limit: first prompts only.
        seen: wraps the prompts, for a progress bar.
    """
    prompts = find_prompts(root)[:limit]
    if parallel.is_main and not published_sizes([prompt.metadata for prompt in prompts]):
        logger.warning(
            "%d prompts are not GenEval's 553; the score cannot be compared with published ones", len(prompts)
        )
    decisive = {
        **settings,
        "rule": vars(rule),
        "position_threshold": position_threshold,
        "images": [_state(path) for prompt in prompts for path in prompt.images],
        "metadata": [prompt.metadata for prompt in prompts],
    }
    partial = PartialResults(work_dir / "partial", "geneval", decisive, parallel)
    for number in seen(partial.pending(len(prompts))):
        records = score_prompt(prompts[number], detector, colours, rule, position_threshold)
        partial.append(number, {"records": records})
    records = [record for _, item in partial.collect().items() for record in item["records"]]
    return summarize(Outcome(each["tag"], each["prompt"], each["correct"]) for each in records), records


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, in the keys of GenEval's own result file."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def _state(path: Path) -> list[object]:
    """Changes when a file is replaced."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} is no image that can be read ({error}); sample it again.") from error
