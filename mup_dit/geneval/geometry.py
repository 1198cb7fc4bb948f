"""Boxes: overlap, and which way one lies from another.

Boxes are (x0, y0, x1, y1) in pixels, x to the right, y down, ends included.

Source: specification 6 (GenEval).
"""

import math
from collections.abc import Sequence

Box = Sequence[float]

POSITION_THRESHOLD = 0.1
DIRECTION_SHARE = 0.5  # of the offset that an axis must hold
TOUCHING = 1e-3  # offsets below say nothing


def relative_positions(first: Box, second: Box, threshold: float = POSITION_THRESHOLD) -> set[str]:
    """Where the first box lies from the second: any of left of, right of, above, below.

    The offset of the centres is shrunk towards 0 by ``threshold`` times the sum of the sizes, axis by axis, and divided
    by the length of the offset before shrinking.
    """
    offset, shrunk = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (first[low] + first[high] - second[low] - second[high]) / 2
        sizes = abs(first[high] - first[low]) + abs(second[high] - second[low])
        offset.append(distance)
        shrunk.append(math.copysign(max(abs(distance) - threshold * sizes, 0.0), distance))
    if all(abs(value) < TOUCHING for value in shrunk):
        return set()
    right, down = (value / math.hypot(*offset) for value in shrunk)
    found = set()
    for value, negative, positive in ((right, "left of", "right of"), (down, "above", "below")):
        if abs(value) > DIRECTION_SHARE:
            found.add(positive if value > 0 else negative)
    return found


def area(box: Box) -> float:
    """Pixels of a box, 0 if it is empty."""
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def intersection_over_union(first: Box, second: Box) -> float:
    """Shared pixels over pixels in either."""
    common = (
        max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3]),
    )  # fmt: skip
    shared = area(common)
    union = area(first) + area(second) - shared
    return shared / union if union else 0.0
