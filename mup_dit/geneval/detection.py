"""What a detector gives, and which of it counts.

Source: specification 6 (GenEval).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from numpy.typing import NDArray
from PIL import Image

from common.config import require_at_least
from common.errors import ConfigError
from mup_dit.geneval.geometry import intersection_over_union


@dataclass(frozen=True)
class Detection:
    """One object.

    Attributes:
        box: x0, y0, x1, y1 in pixels.
        score: confidence in [0, 1].
        mask: bool (H, W) of the whole image, where the detector segments.
    """

    box: tuple[float, float, float, float]
    score: float
    mask: NDArray | None = field(default=None, compare=False, repr=False)


Detections = Mapping[str, Sequence[Detection]]
"""Objects by class name, best first."""


class Detector(Protocol):
    """Finds objects of the 80 classes of COCO."""

    name: str  # folder or hub name, for the record of results

    def __call__(self, images: Sequence[Image.Image]) -> list[Detections]:
        """All objects of each image, whatever their score."""


@dataclass(frozen=True, kw_only=True)
class DetectionRule:
    """Which detections count."""

    threshold: float = 0.3  # scores must be above
    counting_threshold: float = 0.9  # the same in the counting task
    max_objects: int = 16  # of a class
    max_overlap: float = 1.0  # intersection over union with a better one of its class; 1: no suppression

    def __post_init__(self) -> None:
        for name in ("threshold", "counting_threshold", "max_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"geneval.rule.{name}={getattr(self, name)} must lie in [0, 1].")
        require_at_least("geneval.rule.max_objects", self.max_objects, 1)

    def apply(self, detections: Detections, tag: str) -> dict[str, list[Detection]]:
        """The detections that count in a task, best first; classes without any are left out."""
        threshold = self.counting_threshold if tag == "counting" else self.threshold
        kept = {}
        for name, found in detections.items():
            ranked = sorted((each for each in found if each.score > threshold), key=lambda each: -each.score)
            if chosen := self._without_overlaps(ranked[: self.max_objects]):
                kept[name] = chosen
        return kept

    def _without_overlaps(self, ranked: Sequence[Detection]) -> list[Detection]:
        if self.max_overlap == 1:
            return list(ranked)
        kept: list[Detection] = []
        for candidate in ranked:
            if all(intersection_over_union(candidate.box, other.box) < self.max_overlap for other in kept):
                kept.append(candidate)
        return kept
