"""Logged means are weighted by count; rates leave out what is not training."""

import time

import pytest
import torch

from common.meters import Throughput, WeightedMeans, merge, peak_flops, peak_memory_gb
from common.parallel import Parallel

ALONE = Parallel(0, 1, 0, torch.device("cpu"))


def test_mean_is_weighted_and_restarts_after_reading():
    means = WeightedMeans()
    means.add("loss", torch.tensor(6.0), 2)
    means.add("loss", torch.tensor(1.0), 1)
    means.add("share", 0.5, 1.0)
    assert means.means(ALONE) == pytest.approx({"loss": 7 / 3, "share": 0.5})
    assert means.means(ALONE) == {}


def test_nothing_counted_is_left_out_rather_than_divided_by_zero():
    means = WeightedMeans()
    means.add("loss", 0.0, 0.0)
    assert means.means(ALONE) == {}


def test_saved_sums_continue_bit_for_bit():
    values = torch.rand(20, generator=torch.Generator().manual_seed(0))
    whole, first = WeightedMeans(), WeightedMeans()
    for value in values:
        whole.add("loss", value, 3)
    for value in values[:7]:
        first.add("loss", value, 3)
    second = WeightedMeans()
    second.load_state_dict(first.state_dict())
    for value in values[7:]:
        second.add("loss", value, 3)
    assert second.means(ALONE) == whole.means(ALONE)


def test_ranks_are_merged_by_weight_even_if_one_saw_nothing():
    assert merge([{"a": (1.0, 2.0)}, {}, {"a": (3.0, 2.0), "b": (1.0, 1.0)}]) == {"a": (4.0, 4.0), "b": (1.0, 1.0)}


def test_rates_count_training_time_only():
    throughput = Throughput(ALONE, "fp32", tokens_per_sample=10, flops_per_sample=1e6)
    for _ in range(2):
        throughput.start()
        time.sleep(0.02)
        throughput.stop(4)
        time.sleep(0.2)  # validation
    rates = throughput.rates()
    assert 60 < rates["throughput/samples_per_second"] <= 200
    assert rates["throughput/tokens_per_second"] == pytest.approx(10 * rates["throughput/samples_per_second"])
    expected = rates["throughput/samples_per_second"] * 1e6 / peak_flops(ALONE.device, "fp32")
    assert rates["throughput/mfu"] == pytest.approx(expected)


def test_peak_memory_is_that_of_this_process():
    assert 0.05 < peak_memory_gb(ALONE.device) < 100
