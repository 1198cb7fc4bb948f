"""Figures: thinning keeps the mean, smoothing keeps the ends, both themes are drawn."""

import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from common.report.curves import MAX_POINTS, Series, binned, draw_figure, line_figure, smoothed


@given(length=st.integers(1, 5000), limit=st.integers(2, 300))
def test_binning_bounds_the_points_and_keeps_the_range_of_values(length: int, limit: int):
    y_S = np.sin(np.arange(length))
    x_T, y_T = binned(np.arange(length), y_S, limit)
    assert len(x_T) == len(y_T) <= max(limit, 1)
    assert y_T.min() >= y_S.min() - 1e-12
    assert y_T.max() <= y_S.max() + 1e-12
    assert (np.diff(x_T) > 0).all()


def test_bins_skip_values_that_are_not_finite():
    _, y_T = binned([0, 1, 2, 3], [1.0, np.nan, np.inf, np.nan], limit=2)
    assert y_T[0] == 1.0
    assert np.isnan(y_T[1])


def test_smoothing_leaves_a_straight_line_straight():
    line = np.linspace(5, -3, 50)
    np.testing.assert_allclose(smoothed(line, 9), line, atol=1e-12)


def test_smoothing_bridges_a_gap():
    assert smoothed([1.0, np.nan, 3.0], 3)[1] == 2.0


def test_figures_come_in_a_light_and_a_dark_version():
    series = [Series("train/loss", range(3 * MAX_POINTS), np.linspace(500, 1, 3 * MAX_POINTS)), Series("a", [1], [2])]
    figure = line_figure("loss", "Loss.", series, smooth=5)
    light, dark = (imread(io.BytesIO(png)) for png in (figure.light_png, figure.dark_png))
    assert light.shape == dark.shape
    assert light[0, 0, :3].min() > 0.9
    assert dark[0, 0, :3].max() < 0.2


def test_equal_figures_have_equal_bytes_and_may_have_panels():
    def plot(axes, theme):
        assert len(axes) == 2
        for index, ax in enumerate(axes):
            ax.plot([0, 1], [index, 1], color=theme.colour(index))

    once, twice = (draw_figure("f", "c", plot, panels=2, size=(4, 2)) for _ in range(2))
    assert once == twice
