"""Does an image show what its prompt asks for?

Source: specification 6 (GenEval); golden case ``geneval_evaluate``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mup_dit.geneval.detection import Detection, Detections
from mup_dit.geneval.geometry import POSITION_THRESHOLD, relative_positions

Classify = Callable[[Sequence[Detection], str], list[str]]
"""Detections of a class and its name -> a colour for each."""


@dataclass(frozen=True)
class Decision:
    """``reason`` says what is wrong, nothing for a correct image."""

    correct: bool
    reason: str = ""


def decide(
    metadata: Mapping[str, Any],
    detections: Detections,
    classify: Classify,
    *,
    position_threshold: float = POSITION_THRESHOLD,
) -> Decision:
    """All clauses of ``include`` must hold, and none of ``exclude`` may be reached.

    A clause of ``include`` takes the ``count`` best detections of its class. Its colour must be that of ``count`` of
    them; its position must hold for every pair with the objects of the earlier clause that it names, and cannot hold if
    that clause failed.
    """
    faults: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        found = list(detections.get(clause["class"], ()))[: clause["count"]]
        fault = (
            _count_fault(clause, found)
            or _colour_fault(clause, found, classify)
            or _position_fault(clause, found, groups, position_threshold)
        )
        groups.append(None if fault else found)
        faults += [fault] if fault else []
    for clause in metadata.get("exclude", ()):
        number = len(detections.get(clause["class"], ()))
        if number >= clause["count"]:
            faults.append(f"{clause['class']}: fewer than {clause['count']} wanted, {number} found")
    return Decision(not faults, "; ".join(faults))


def _count_fault(clause: Mapping[str, Any], found: Sequence[Detection]) -> str:
    if len(found) >= clause["count"]:
        return ""
    return f"{clause['class']}: {clause['count']} wanted, {len(found)} found"


def _colour_fault(clause: Mapping[str, Any], found: Sequence[Detection], classify: Classify) -> str:
    if "color" not in clause:
        return ""
    colours = classify(found, clause["class"])
    if colours.count(clause["color"]) >= clause["count"]:
        return ""
    return f"{clause['class']}: {clause['count']} {clause['color']} wanted, seen {', '.join(colours)}"


def _position_fault(
    clause: Mapping[str, Any],
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    threshold: float,
) -> str:
    if "position" not in clause:
        return ""
    relation, number = clause["position"]
    targets = groups[number]
    if targets is None:
        return f"{clause['class']}: nothing that it could be {relation}"
    for each in found:
        for target in targets:
            seen = relative_positions(each.box, target.box, threshold)
            if relation not in seen:
                return f"{clause['class']}: {relation} wanted, is {' and '.join(sorted(seen)) or 'in no direction'}"
    return ""
