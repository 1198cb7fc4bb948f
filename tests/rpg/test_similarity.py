"""Distances in weight space, nearest originals, and the verdict on copies."""

from dataclasses import replace

import pytest
import torch

from common.errors import DataError
from common.evaluation.metric import Metric, mean_metric
from rpg.novelty import GroupSummary, summarize_accuracy
from rpg.similarity import (
    Nearest,
    Spacing,
    ValueSample,
    compute_spacing,
    nearest_originals,
    pairwise_distances,
    principal_plane,
    tensor_statistics,
)
from rpg.verdict import compare_with_noise, judge


def network(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "a.weight": scale * torch.randn(30, 20, generator=draw),
        "steps": torch.tensor(seed),
        "b.weight": 5 + scale * torch.randn(50, generator=draw),
    }


def values_of(sample: ValueSample, states) -> torch.Tensor:
    return sample.matrix([(str(place), each) for place, each in enumerate(states)], len(states))


def test_distances_of_near_copies_are_exact():
    one = network(0)
    near = {name: tensor + 1e-4 * (name == "a.weight") for name, tensor in one.items()}
    sample = ValueSample(one, 3)
    assert sample.is_exact and sample.num_values == 650
    values_KV = values_of(sample, [one, near, network(1)])
    distance_KK = pairwise_distances(values_KV, values_KV)
    assert float(distance_KK[0, 1]) == pytest.approx(1e-4 * 600**0.5, rel=2e-3)  # float32 weights near 1
    expected = torch.cat(
        [(network(1)[name] - one[name]).flatten().double() for name in ("a.weight", "b.weight")]
    ).norm()
    assert float(distance_KK[0, 2]) == pytest.approx(float(expected), rel=1e-6)


def test_a_sample_of_values_estimates_distances():
    states = [network(seed) for seed in range(4)]
    whole, part = ValueSample(states[0], 4), ValueSample(states[0], 4, memory_bytes=4 * 4 * 300, seed=1)
    assert not part.is_exact and 290 <= part.num_sampled <= 310
    exact, estimate = (
        pairwise_distances(values, values) for values in (values_of(whole, states), values_of(part, states))
    )
    off = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(estimate[off], exact[off], rtol=0.15, atol=0)
    rows = tensor_statistics(part, values_of(part, states[:2]), values_of(part, states[2:]))
    assert [row.name for row in rows] == ["a.weight", "b.weight"] and rows[0].values == 600
    assert 0.7 < rows[0].std < 1.3 and 0.7 < rows[1].generated_std < 1.3  # in the network's own units


def test_networks_of_another_architecture_are_named():
    sample = ValueSample(network(0), 2)
    with pytest.raises(DataError, match=r"second: a.weight is \(3, 3\), in the first network \(30, 20\)"):
        sample.values({**network(1), "a.weight": torch.zeros(3, 3)}, "second")
    with pytest.raises(DataError, match="b.weight is missing"):
        sample.values({"a.weight": torch.zeros(30, 20)}, "second")
    with pytest.raises(DataError, match="nothing to compare"):
        ValueSample({"steps": torch.tensor(1)}, 1)


def test_the_nearest_original_is_found_with_its_name():
    originals = [network(seed) for seed in range(3)]
    sample = ValueSample(originals[0], 5)
    half_way = {
        name: torch.lerp(originals[1][name].double(), originals[2][name].double(), 0.1).float() for name in originals[0]
    }
    values_KV = values_of(sample, originals)
    copy, mixed = nearest_originals(
        ["copy", "mixed"], values_of(sample, [originals[2], half_way]), list("xyz"), values_KV
    )
    assert (copy.original, mixed.original) == ("z", "y")
    assert copy.distance == pytest.approx(0, abs=1e-5) and copy.cosine == pytest.approx(1)
    assert mixed.distance == pytest.approx(0.1 * float(pairwise_distances(values_KV, values_KV)[1, 2]), rel=1e-4)
    assert 0 < mixed.relative < 1 and mixed.cosine > 0.8


def test_spacing_of_a_line_of_checkpoints():
    line_KV = torch.arange(5.0)[:, None].expand(5, 9) / 3  # consecutive distance 1
    spacing = compute_spacing(line_KV)
    assert spacing.neighbour == pytest.approx(1) and spacing.pair == pytest.approx(2)
    assert spacing.copy_limit == pytest.approx(1)  # half of a mean pair, below 3 neighbours
    assert compute_spacing(line_KV[:1]) == Spacing(None, None)


def test_the_plane_keeps_the_distances_of_points_in_a_plane():
    draw = torch.Generator().manual_seed(0)
    basis_2V, places_K2 = torch.randn(2, 40, generator=draw), torch.randn(6, 2, generator=draw)
    values_KV = places_K2 @ torch.linalg.qr(basis_2V.T)[0].T + 7
    plane, shares = principal_plane({"original": values_KV[:4], "generated": values_KV[4:]})
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    points = torch.cat([plane["original"], plane["generated"]])
    torch.testing.assert_close(
        torch.cdist(points, points), torch.cdist(places_K2, places_K2).double(), atol=1e-4, rtol=0
    )


# ---------------------------------------------------------------- verdict


def summary(name: str, accuracies, similarity=None) -> GroupSummary:
    values = None if similarity is None else torch.tensor(similarity, dtype=torch.float64)
    return summarize_accuracy(name, torch.tensor(accuracies, dtype=torch.float64), similarity_K=values)


GROUPS = {
    "original": summary("original", [0.96, 0.97], [0.95, 0.95]),
    "generated": summary("generated", [0.96, 0.96], [0.7, 0.8]),
    "noise 0.1": summary("noise 0.1", [0.92, 0.92], [0.6, 0.6]),
    "noise 0.01": summary("noise 0.01", [0.96, 0.96], [0.9, 0.9]),
    "mean": summary("mean", [0.99]),
}


def test_the_noise_curve_is_read_at_the_similarity_of_generated_networks():
    compared = compare_with_noise(GROUPS["generated"], [GROUPS["noise 0.01"], GROUPS["noise 0.1"]])
    assert compared.noise_accuracy == pytest.approx(0.94)  # half-way between the levels
    assert compared.difference == pytest.approx(0.02) and compared.side == 0
    unlike = summary("generated", [0.5, 0.5], [0.1, 0.1])
    assert compare_with_noise(unlike, [GROUPS["noise 0.1"]]).side == -1
    assert compare_with_noise(unlike, []) is None


@pytest.mark.parametrize("distance, passed", [(0.01, False), (0.5, True)])
def test_a_network_at_the_distance_of_a_neighbour_is_a_copy(distance, passed):
    nearest = [Nearest("g1", "o1", distance, 0.1, 0.5, 1.0), Nearest("g2", "o2", 0.7, 0.1, 0.5, 1.0)]
    findings = judge(
        nearest,
        Spacing(0.1, 1.0),
        GROUPS,
        original="original",
        generated="generated",
        noised=["noise 0.1", "noise 0.01"],
        mean="mean",
    )
    weights, behaviour, noise, mean, originals = findings
    assert weights.passed is passed and "g1 to o1" in weights.measured
    assert behaviour.passed and noise.passed and originals.passed
    assert mean.passed is False


def test_nothing_is_claimed_where_nothing_can_be_known():
    nearest = [Nearest("g1", "o1", 0.5, 0.1, 0.5, 1.0)]
    (weights,) = judge(nearest, Spacing(None, None), {}, original="original", generated="generated")
    assert weights.passed is None
    unlike = {**GROUPS, "generated": summary("generated", [0.5, 0.5], [0.1, 0.1])}
    close = {**GROUPS, "generated": summary("generated", [0.90, 0.99], [0.7, 0.8])}  # 0.005 above, +- 0.045
    noise = judge([], Spacing(0.1, 1), close, original="original", generated="generated",
                  noised=["noise 0.1", "noise 0.01"])[1]  # fmt: skip
    assert noise.passed is None and noise.measured.startswith("+0.0050 +- 0.0450")
    findings = judge([], Spacing(0.1, 1), unlike, original="original", generated="generated", noised=["noise 0.1"])
    assert [each.passed for each in findings] == [True, None, False]
    assert mean_metric("x", [1.0]).standard_error is None


def test_a_generator_of_one_network_is_told_apart():
    within = Metric("within", 1.0, None)
    same = {**GROUPS, "generated": replace(summary("generated", [0.97, 0.97], [0.8, 0.8]), within=within)}
    (finding, *_) = judge([], Spacing(0.1, 1), same, original="original", generated="generated")
    assert finding.claim.startswith("generated networks differ") and finding.passed is False
    varied = {**GROUPS, "generated": replace(same["generated"], within=Metric("within", 0.5, None))}
    (finding, *_) = judge([], Spacing(0.1, 1), varied, original="original", generated="generated")
    assert finding.passed is True
