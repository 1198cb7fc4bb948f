"""Buckets; the tables themselves are a golden case."""

import pytest

from common.errors import ConfigError
from mup_dit.aspect_ratios import TABLES, aspect_ratio_table, nearest_bucket


@pytest.mark.parametrize("size", TABLES)
def test_buckets_hold_about_the_area_of_the_square(size):
    for height, width in aspect_ratio_table(size).values():
        assert height % (size // 16) == width % (size // 16) == 0
        assert abs(height * width / size**2 - 1) < 0.1


def test_an_image_goes_to_the_nearest_bucket():
    table = aspect_ratio_table(256)
    assert nearest_bucket(300, 300, table) == (256, 256)
    assert nearest_bucket(100, 400, table) == (128, 512)
    assert nearest_bucket(9000, 100, table) == (512, 128)


def test_a_size_without_a_table_is_named():
    with pytest.raises(ConfigError, match="size=300"):
        aspect_ratio_table(300)
