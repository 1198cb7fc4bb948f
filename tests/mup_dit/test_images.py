"""Crops and the map from pixels to [-1, 1]; ADM's crop is compared with the reference in the golden cases."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.errors import ConfigError
from mup_dit.images import center_crop, crop_image, fit_and_crop, resize_and_crop, to_tensor


@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 24))
def test_every_crop_has_the_size_that_is_asked_for(height, width, size):
    image = Image.new("RGB", (width, height))
    assert center_crop(image, size).size == resize_and_crop(image, size).size == (size, size)
    assert fit_and_crop(image, size, 2 * size).size == (2 * size, size)


def test_the_middle_is_kept():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    for crop in (center_crop, resize_and_crop):
        assert np.asarray(crop(Image.fromarray(pixels), 8)).min() == 255


def test_pixels_become_numbers_between_minus_one_and_one():
    pixels = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3)
    torch.testing.assert_close(to_tensor(pixels).flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_grey_and_colour():
    image = Image.new("RGB", (9, 9), (255, 0, 0))
    assert crop_image(image, 4, "adm", 1).shape == (4, 4, 1) and crop_image(image.convert("L"), 4, "adm").shape[2] == 3
    for options, text in ((("none", 3), "has 9 x 9"), (("square", 3), "choose one of"), (("adm", 4), "channels=4")):
        with pytest.raises(ConfigError, match=text):
            crop_image(image, 4, *options)
