"""Buckets of sizes that a model of several aspect ratios is trained and sampled at.

A table maps the ratio of height to width, as text with two digits, to height and width in pixels; all its sizes hold
about as many pixels as the square one. The tables of 512 and 1024 pixels are that of 256, enlarged; those of sampling
(``_TEST``) leave out ratios that are rare in training data.

Source: PixArt-alpha's tables, golden case ``aspect_ratio_tables``.
"""

from collections.abc import Mapping

from common.config import require_choice

Bucket = tuple[int, int]
"""Height and width in pixels."""

# sides in sixteenths of the square's: heights from 8 to 32, widths that keep the area
_SIDES = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21),
    (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15),
    (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (26, 9),
    (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8),
)  # fmt: skip
_TRAINING_ONLY = frozenset({"0.26", "0.27", "2.89", "3.11", "3.62", "3.75", "3.88"})


def _table(size: int, *, test: bool = False) -> dict[str, Bucket]:
    unit = size // 16
    table = {str(round(height / width, 2)): (unit * height, unit * width) for height, width in _SIDES}
    return {key: sides for key, sides in table.items() if not (test and key in _TRAINING_ONLY)}


ASPECT_RATIO_256, ASPECT_RATIO_256_TEST = _table(256), _table(256, test=True)
ASPECT_RATIO_512, ASPECT_RATIO_512_TEST = _table(512), _table(512, test=True)
ASPECT_RATIO_1024, ASPECT_RATIO_1024_TEST = _table(1024), _table(1024, test=True)
TABLES = {256: ASPECT_RATIO_256, 512: ASPECT_RATIO_512, 1024: ASPECT_RATIO_1024}
TEST_TABLES = {256: ASPECT_RATIO_256_TEST, 512: ASPECT_RATIO_512_TEST, 1024: ASPECT_RATIO_1024_TEST}


def aspect_ratio_table(size: int, *, test: bool = False) -> dict[str, Bucket]:
    """The table whose square has side ``size``.

    Raises: ConfigError for a size without a table.
    """
    require_choice("size", size, tuple(TABLES))
    return (TEST_TABLES if test else TABLES)[size]


def nearest_key(ratio: float, table: Mapping[str, Bucket]) -> str:
    """The table's key next to ``ratio`` (height by width); of two equally near ones the first."""
    return min(table, key=lambda key: abs(float(key) - ratio))


def nearest_bucket(height: float, width: float, table: Mapping[str, Bucket]) -> Bucket:
    """Height and width of the bucket for an image."""
    return table[nearest_key(height / width, table)]
