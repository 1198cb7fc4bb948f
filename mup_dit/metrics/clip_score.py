"""CLIP score: how well images fit their captions.

Source: specification 6: cosine times exp(logit_scale), ViT-B/32. Captions come from the samples' manifest, or from a
file of prompts in the samples' order; taking them from truncated file names, as the reference does, is an option.

Dimensions: B images.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.evaluation.metric import Metric, mean_metric
from mup_dit.image_files import replace_whole, to_image
from mup_dit.metrics.clip import Clip
from mup_dit.metrics.image_sets import ImageBatch, ImageSet, read_manifest
from mup_dit.requests import read_prompts

FROM_MANIFEST, FROM_NAMES = "manifest", "names"


@dataclass(frozen=True)
class Score:
    """One image's."""

    file: str
    caption: str
    value: float


def score_batch(clip: Clip, batch: ImageBatch, captions: Sequence[str]) -> list[float]:
    """100 cos(image, caption) of a batch, with CLIP's own factor in place of 100."""
    image_BD = clip.embed_images([to_image(image).convert("RGB") for image in batch.images])
    text_BD = clip.embed_texts(captions)
    return (clip.scale * (image_BD * text_BD).sum(dim=-1)).tolist()


class Captions:
    """The caption of each image of a set.

    Args:
        source: ``manifest``: of the samples' folder; ``names``: the file's name with blanks for ``_``; else a file of
            prompts (``.txt``, ``.json``, ``.jsonl``), one per image or dividing their number.

    Raises: DataError if there are no captions, or not as many as images need.
    """

    def __init__(self, source: str, where: str, images: ImageSet) -> None:
        self._by_index: Sequence[str] | None = None
        if source == FROM_NAMES:
            return
        folder = Path(where) if Path(where).is_dir() else Path(where).parent
        if source == FROM_MANIFEST:
            self._by_index = [record["prompt"] for record in read_manifest(folder) if "prompt" in record]
            if not self._by_index:
                raise DataError(
                    f"{folder} has no manifest.jsonl with prompts; give captions=FILE, or captions=names if the files "
                    "are named by their captions."
                )
        else:
            self._by_index = read_prompts(source)[0]
        if not self._by_index or len(images) % len(self._by_index):
            raise DataError(
                f"captions={source} holds {len(self._by_index)} captions for {len(images)} images; it needs one each, "
                "or one for every so many consecutive images."
            )
        self._repeat = len(images) // len(self._by_index)

    def of(self, batch: ImageBatch) -> list[str]:
        if self._by_index is None:
            return [Path(file).stem.replace("_", " ") for file in batch.files]
        return [self._by_index[index // self._repeat] for index in batch.indices]


def summarize(scores: Mapping[int, Score]) -> list[Metric]:
    """Mean with its standard error, spread and extremes."""
    values = np.array([score.value for score in scores.values()], np.float64)
    if not len(values):
        raise DataError("there are no images to score.")
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return [
        mean_metric("clip_score", values.tolist()),
        Metric("clip_score_std", spread),
        Metric("clip_score_min", float(values.min())),
        Metric("clip_score_max", float(values.max())),
    ]


def write_csv(path: Path, scores: Mapping[int, Score]) -> None:
    """Columns filename, clip_score, caption, in the order of images."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["filename", "clip_score", "caption"])
            writer.writerows([score.file, score.value, score.caption] for _, score in sorted(scores.items()))

    replace_whole(path, write)
