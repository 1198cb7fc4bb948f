"""One pass over a set of images: every sum that its metrics need.

Memory is constant in the number of images, except for precision and recall, which keep features.

Dimensions: N images, D features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.errors import ConfigError, DataError
from common.parallel import Parallel
from mup_dit.metrics.clean_resize import clean_batch
from mup_dit.metrics.features import FeatureNetwork
from mup_dit.metrics.image_sets import ImageBatch, ImageSet
from mup_dit.metrics.inception import InceptionFeatures, require_rgb
from mup_dit.metrics.inception_score import SPLIT_SIZE, ScoreAccumulator
from mup_dit.metrics.moments import MomentAccumulator, Moments

NEEDS = ("pool", "spatial", "score", "points", "clean")


@dataclass
class Collection:
    """What was found in a set; parts that were not asked for stay empty.

    Attributes:
        count: images.
        points: features by image number, for precision and recall.
    """

    count: int = 0
    pool: MomentAccumulator = field(default_factory=MomentAccumulator)
    spatial: MomentAccumulator = field(default_factory=MomentAccumulator)
    clean: MomentAccumulator = field(default_factory=MomentAccumulator)
    score: ScoreAccumulator = field(default_factory=ScoreAccumulator)
    points: dict[int, Tensor] = field(default_factory=dict)

    def merge(self, other: "Collection") -> None:
        """Adds another process's part."""
        self.count += other.count
        for name in ("pool", "spatial", "clean", "score"):
            getattr(self, name).merge(getattr(other, name))
        self.points |= other.points

    def points_ND(self) -> Tensor:
        """All features, in the order of images."""
        return torch.cat([self.points[first] for first in sorted(self.points)])

    def moments(self) -> dict[str, Moments]:
        """Finished moments by kind."""
        kinds = {"pool": self.pool, "spatial": self.spatial, "clean": self.clean}
        return {name: accumulator.finish() for name, accumulator in kinds.items() if not accumulator.is_empty}


def collect_features(
    images: ImageSet,
    network: FeatureNetwork,
    needs: set[str],
    *,
    batch_size: int,
    parallel: Parallel,
    split_size: int = SPLIT_SIZE,
    clean_size: int | None = 256,
    seen: Callable[[Iterator[ImageBatch]], Iterator[ImageBatch]] = iter,
) -> Collection:
    """The parts ``needs`` of a set, over all processes. Collective.

    Args:
        clean_size: side of the square that ``clean`` scales images to first; None: none.
        seen: wraps the batches, for a progress bar.

    Raises: DataError if there are no images, ConfigError for ``clean`` features without the Inception network.
    """
    if "clean" in needs and not isinstance(network, InceptionFeatures):
        raise ConfigError("metrics: clean_fid is defined with Inception; use features=inception.")
    mine = Collection(score=ScoreAccumulator(split_size))
    for batch in seen(images.batches(batch_size, parallel.rank, parallel.world_size)):
        require_rgb(batch.images)
        mine.count += len(batch.images)
        if needs - {"clean"}:
            features = network(batch.images)
            if "pool" in needs:
                mine.pool.update(features.pool_BD.numpy())
            if "spatial" in needs:
                mine.spatial.update(features.spatial_BE.numpy())
            if "score" in needs:
                mine.score.update(features.logits_BK.numpy(), batch.indices)
            if "points" in needs:
                mine.points[batch.indices[0]] = features.pool_BD
        if "clean" in needs:
            mine.clean.update(network.ready(clean_batch(batch.images, clean_size)).pool_BD.numpy())
    whole, *others = parallel.gather(mine)
    for other in others:
        whole.merge(other)
    if not whole.count:
        raise DataError(f"{images.name} holds no images.")
    return whole
