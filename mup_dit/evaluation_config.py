"""Options of ``python -m mup_dit.evaluate``."""

from dataclasses import dataclass, field
from typing import Literal

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from mup_dit.batches import ON_ERROR
from mup_dit.geneval.detection import DetectionRule
from mup_dit.geneval.geometry import POSITION_THRESHOLD
from mup_dit.geneval.mask2former import DEFAULT as DEFAULT_DETECTOR
from mup_dit.metrics.clip import VIT_B_32, VIT_L_14
from mup_dit.metrics.inception_score import SPLIT_SIZE
from mup_dit.metrics.precision_recall import NEIGHBOURS

METRICS = ("fid", "sfid", "is", "precision_recall", "clip_score", "clean_fid", "geneval")
COMPARING = ("fid", "sfid", "precision_recall", "clean_fid")
"""Metrics that need a reference."""
FEATURES = ("inception", "digits")


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """Options of group ``clip``."""

    model: str = VIT_B_32  # folder or hub name in transformers' format
    captions: str = "manifest"  # manifest, names (of the files), or a .txt, .json or .jsonl file in the images' order


@dataclass(frozen=True, kw_only=True)
class GenEvalOptions:
    """Options of group ``geneval``."""

    detector: str = DEFAULT_DETECTOR  # folder or hub name of a Mask2Former for instances of COCO
    colours: str = VIT_L_14  # folder or hub name of CLIP, which names colours
    rule: DetectionRule = field(default_factory=DetectionRule)
    position_threshold: float = POSITION_THRESHOLD  # share of the objects' sizes by which an offset is shrunk
    limit: int | None = None  # first so many prompts

    def __post_init__(self) -> None:
        require_at_least("geneval.position_threshold", self.position_threshold, 0)
        if self.limit is not None:
            require_at_least("geneval.limit", self.limit, 1)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of ``python -m mup_dit.evaluate``."""

    samples: str  # .npz with arr_0, folder of images or of mup_dit.sample, or a data set's name
    reference: str | None = None  # the same, or .npz with mu and sigma
    metrics: list[str] = field(default_factory=lambda: ["fid", "sfid", "is", "precision_recall"])
    work_dir: str = "evaluation"  # results.json and the files of single metrics
    overwrite: bool = False  # replace the results that are there

    features: Literal["inception", "digits"] = "inception"  # digits: a classifier trained on the fly; for 8 x 8 digits
    inception: str | None = None  # torch-fidelity's weights: file or hub name; null: download
    batch_size: int = 64  # images per forward pass and process; does not change a result
    num_samples: int | None = None  # first so many samples; null: all
    split_size: int = SPLIT_SIZE  # is: images of a split
    neighbours: int = NEIGHBOURS  # precision_recall: k
    half_precision_compat: bool = False  # precision_recall: round distances as ADM's evaluator does
    clean_size: int | None = 256  # clean_fid: crop squares and scale them to this first; null: as they are
    split: str = "validation"  # of data sets by name
    reference_split: str | None = None  # of a reference by name; null: as split
    image_size: int | None = None  # of data sets by name; null: 256, of digits 8
    on_error: Literal["stop", "skip"] = "stop"  # at a broken image of a folder
    save_statistics: str | None = None  # .npz file: the samples' moments, which can serve as a reference

    clip: ClipOptions = field(default_factory=ClipOptions)
    geneval: GenEvalOptions = field(default_factory=GenEvalOptions)

    seed: int = 0  # stands in the results; nothing here is random
    device: str | None = None  # null: this process's GPU, else the CPU
    progress: bool = True

    def __post_init__(self) -> None:
        for name in self.metrics:
            require_choice("metrics", name, METRICS)
        require_choice("features", self.features, FEATURES)
        require_choice("on_error", self.on_error, ON_ERROR)
        for name in ("batch_size", "split_size", "neighbours", "image_size", "num_samples", "clean_size"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        if not self.metrics and not self.save_statistics:
            raise ConfigError(f"metrics is empty; give some of {', '.join(METRICS)}.")
        comparing = [name for name in COMPARING if name in self.metrics]
        if comparing and not self.reference:
            raise ConfigError(
                f"metrics={comparing[0]} compares with a reference; give reference=FILE.npz, a folder of images, or a "
                "data set's name."
            )
        if self.features == "digits" and "clean_fid" in self.metrics:
            raise ConfigError("metrics=clean_fid is defined with Inception; use features=inception, or metrics=[fid].")
        if not self.work_dir:
            raise ConfigError("work_dir is empty; give a folder for the results.")
        if self.save_statistics and not self.save_statistics.endswith(".npz"):
            raise ConfigError(f"save_statistics={self.save_statistics} must end with .npz.")
