"""Mixup and CutMix: shares, boxes and targets, the same on any number of processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from logah.data import DataSection, build_data
from logah.mixed_rows import MixedRows
from logah.mixing import Mix, apply_mix, draw_mix, require_mix, soft_targets

BOTH = {"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "switch": 0.5}


@given(step=st.integers(0, 500), height=st.integers(2, 40), width=st.integers(2, 40))
def test_the_share_of_cutmix_is_the_area_that_is_left(step: int, height: int, width: int):
    mix = draw_mix(3, step, **BOTH | {"switch": 1.0}, size=(height, width))
    first = {"images": torch.zeros(2, 3, height, width), "labels": torch.tensor([0, 1])}
    second = {"images": torch.ones(2, 3, height, width), "labels": torch.tensor([2, 3])}
    mixed = apply_mix(mix, first, second)
    assert float(mixed["images"].mean()) == pytest.approx(1 - mix.share, abs=1e-6)
    assert torch.equal(mixed["share"], torch.full((2,), mix.share))


def test_both_kinds_are_drawn_and_steps_without_mixing_leave_images_alone():
    drawn = [draw_mix(0, step, **BOTH, size=(8, 8)) for step in range(200)]
    assert 60 < sum(mix.box is not None for mix in drawn) < 140
    mixed = [mix.share for mix in drawn if mix.box is None]
    assert abs(sum(mixed) / len(mixed) - 0.5) < 0.1
    assert all(draw_mix(0, step, **BOTH | {"probability": 0.0}, size=(8, 8)) is None for step in range(5))
    images = torch.rand(2, 3, 8, 8)
    batch = {"images": images, "labels": torch.tensor([0, 1])}
    assert torch.equal(apply_mix(None, batch, batch)["images"], images)


def test_mixed_targets_are_distributions_over_both_labels():
    label_B, other_B, share_B = torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([0.75, 0.4])
    target_BC = soft_targets(label_B, other_B, share_B, 4, 0.0)
    torch.testing.assert_close(target_BC, torch.tensor([[0.75, 0, 0.25, 0], [0, 1.0, 0, 0]]))
    smooth_BC = soft_targets(label_B, None, None, 4, 0.2)
    torch.testing.assert_close(smooth_BC, torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.85, 0.05, 0.05]]))


def test_each_process_makes_its_rows_of_the_same_mixed_batch():
    data = build_data(DataSection(batch_size=8, limit_train=40), seed=5)
    rows = MixedRows(data.train, 8, **BOTH)
    for step in (0, 3):
        begin = 8 * step
        whole = rows.fetch(range(begin, begin + 8))
        parts = [rows.fetch(range(begin, begin + 3)), rows.fetch(range(begin + 3, begin + 8))]
        for name, value in whole.items():
            assert torch.equal(value, torch.cat([part[name] for part in parts])), name
        plain = data.training_batch(step)
        mix = draw_mix(5, step, **BOTH, size=(8, 8))
        if mix.box is None:
            expected = mix.share * plain["images"] + (1 - mix.share) * plain["images"].flip(0)
            torch.testing.assert_close(whole["images"], expected)
        assert torch.equal(whole["other_labels"], plain["labels"].flip(0))
    two_steps = rows.fetch(range(16))
    assert torch.equal(two_steps["images"][8:], rows.fetch(range(8, 16))["images"])


def test_mix_of_one_share_needs_no_box():
    assert Mix(0.3).box is None
    with pytest.raises(ConfigError, match="training.cutmix=-1"):
        require_mix(0.0, -1, 1.0, 0.5)
    with pytest.raises(ConfigError, match="mix_switch=2 must lie"):
        require_mix(0.0, 1.0, 1.0, 2)
