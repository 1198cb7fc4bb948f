"""Decisions on given detections; the reference's own are golden cases."""

import pytest

from common.errors import ConfigError
from mup_dit.geneval.decision import decide
from mup_dit.geneval.detection import Detection, DetectionRule
from mup_dit.geneval.geometry import intersection_over_union, relative_positions

CAT, FAR_CAT, DOG = (0, 0, 10, 10), (100, 0, 110, 10), (50, 0, 60, 10)


def no_colours(detections, name):
    raise AssertionError("no clause asks for a colour")


def test_every_pair_must_stand_in_the_relation():
    seen = {"cat": [Detection(CAT, 0.9), Detection(FAR_CAT, 0.8)], "dog": [Detection(DOG, 0.9)]}
    metadata = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}
    assert decide(metadata, seen, no_colours).correct
    metadata["include"][1]["count"] = 2  # the second cat is right of the dog
    decision = decide(metadata, seen, no_colours)
    assert not decision.correct and "right of" in decision.reason


def test_only_the_best_detections_are_asked_for_their_colour():
    seen = {"cat": [Detection(CAT, 0.9), Detection(FAR_CAT, 0.8)]}
    metadata = {"include": [{"class": "cat", "count": 1, "color": "red"}]}
    colour = {CAT: "blue", FAR_CAT: "red"}
    decision = decide(metadata, seen, lambda detections, name: [colour[each.box] for each in detections])
    assert not decision.correct and "blue" in decision.reason


def test_all_faults_are_named():
    metadata = {"include": [{"class": "bus", "count": 1}], "exclude": [{"class": "cat", "count": 1}]}
    reason = decide(metadata, {"cat": [Detection(CAT, 0.9)]}, no_colours).reason
    assert "bus" in reason and "cat" in reason


def test_rules_drop_weak_many_and_overlapping_detections():
    found = {"cat": [Detection((0, 0, 9, 9 + step), 0.95 - 0.1 * step) for step in range(8)], "dog": []}
    assert [round(each.score, 2) for each in DetectionRule().apply(found, "colors")["cat"]] == [
        0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35,
    ]  # fmt: skip
    assert len(DetectionRule().apply(found, "counting")["cat"]) == 1
    assert len(DetectionRule(max_objects=2).apply(found, "colors")["cat"]) == 2
    kept = DetectionRule(max_overlap=0.8).apply(found, "colors")["cat"]
    assert all(intersection_over_union(a.box, b.box) < 0.8 for a in kept for b in kept if a is not b)
    assert DetectionRule().apply({"dog": []}, "colors") == {}
    with pytest.raises(ConfigError, match=r"geneval\.rule\.threshold=2"):
        DetectionRule(threshold=2)


def test_relations_are_opposite_when_boxes_are_swapped():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for other in ((30, 0, 40, 10), (0, 40, 10, 50), (25, 25, 35, 35), (5, 5, 15, 15)):
        assert {opposite[each] for each in relative_positions(CAT, other)} == relative_positions(other, CAT)
