"""GenEval's prompts: the published list's format, its checks, and lists of one's own of the same make.

The published 553 prompts are the file ``prompts/evaluation_metadata.jsonl`` of GenEval's repository. Scores are
comparable with the paper's for that list only.

Source: Ghosh et al. 2023 (arXiv 2310.11513); specification 6.
"""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.config import require_choice
from common.errors import DataError
from common.seeding import generator

TASK_SIZES = {
    "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
}  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}

# the 80 classes of COCO in its order, in the words of GenEval's prompts
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
UNCOUNTABLE = ("skis", "scissors")
PLURALS = {"person": "people", "knife": "knives", "computer mouse": "computer mice", "sheep": "sheep"}


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """One mapping a line with ``tag``, ``include`` and ``prompt``; ``exclude`` where wanted.

    Raises: DataError naming the first line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: no JSON ({error.msg}).") from None
        check_metadata(entries[-1], f"{path}, line {number}")
    if not entries:
        raise DataError(f"{path} holds no prompts.")
    return entries


def check_metadata(entry: Any, where: str) -> None:
    """Raises: DataError for an entry that cannot be judged."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("prompt"), str):
        raise DataError(f"{where}: no prompt; expected GenEval's metadata with tag, include and prompt.")
    if not isinstance(entry.get("tag"), str) or not entry.get("include"):
        raise DataError(f"{where}: no tag or no include clause for {entry['prompt']!r}.")
    for place, clause in enumerate([*entry["include"], *entry.get("exclude", ())]):
        if clause.get("class") not in CLASSES:
            raise DataError(f"{where}: class {clause.get('class')!r} is none of the 80 that the detector knows.")
        if not isinstance(clause.get("count"), int) or clause["count"] < 1:
            raise DataError(f"{where}: count {clause.get('count')!r} of {clause['class']} is no positive number.")
        if "color" in clause:
            require_choice(f"{where}: color", clause["color"], COLOURS)
        if "position" in clause:
            relation, target = clause["position"]
            require_choice(f"{where}: position", relation, POSITIONS)
            if not 0 <= target < place:
                raise DataError(
                    f"{where}: the position of clause {place} refers to clause {target}, not to an earlier."
                )


def published_sizes(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are as many prompts of each task as in the published list."""
    return Counter(entry["tag"] for entry in entries) == Counter(TASK_SIZES)


def make_prompts(seed: int = 0) -> list[dict[str, Any]]:
    """553 prompts of the same tasks, sizes and wording as the published list, drawn anew.

    For trials without a download; scores on them cannot be compared with published ones.
    """
    rng = generator(seed, "geneval prompts")
    paintable = [name for name in CLASSES if name != "person"]
    # an orange that is orange says nothing of colours
    coloured = [(colour, name) for name in paintable for colour in COLOURS if colour != name]
    pairs = list(itertools.combinations(CLASSES, 2))
    counted = [(number, name) for name in CLASSES if name not in UNCOUNTABLE for number in NUMBERS]
    ordered = [(first, relation, second) for first, second in itertools.permutations(CLASSES, 2)
               for relation in POSITIONS]  # fmt: skip
    entries = [_entry("single_object", f"a photo of {_one(name)}", [_clause(name)]) for name in CLASSES]
    for first, second in _choose(pairs, TASK_SIZES["two_object"], rng):
        prompt = f"a photo of {_one(first)} and {_one(second)}"
        entries.append(_entry("two_object", prompt, [_clause(first), _clause(second)]))
    for number, name in _choose(counted, TASK_SIZES["counting"], rng):
        prompt = f"a photo of {NUMBERS[number]} {_plural(name)}"
        entries.append(_entry("counting", prompt, [_clause(name, number)], [_clause(name, number + 1)]))
    for colour, name in _choose(coloured, TASK_SIZES["colors"], rng):
        prompt = f"a photo of {_one(f'{colour} {name}')}"
        entries.append(_entry("colors", prompt, [_clause(name, color=colour)]))
    for first, relation, second in _choose(ordered, TASK_SIZES["position"], rng):
        prompt = f"a photo of {_one(first)} {relation} {_one(second)}"
        entries.append(_entry("position", prompt, [_clause(second), _clause(first, position=[relation, 0])]))
    for _ in range(TASK_SIZES["color_attr"]):
        (colour, name), (other_colour, other) = _different(coloured, rng)
        prompt = f"a photo of {_one(f'{colour} {name}')} and {_one(f'{other_colour} {other}')}"
        clauses = [_clause(name, color=colour), _clause(other, color=other_colour)]
        entries.append(_entry("color_attr", prompt, clauses))
    return entries


def _choose(items: Sequence, count: int, rng: torch.Generator) -> list:
    return [items[index] for index in torch.randperm(len(items), generator=rng)[:count].tolist()]


def _different(coloured: Sequence[tuple[str, str]], rng: torch.Generator) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two objects of different classes and colours."""
    while True:
        first, second = _choose(coloured, 2, rng)
        if first[0] != second[0] and first[1] != second[1]:
            return first, second


def _entry(tag: str, prompt: str, include: list[dict], exclude: list[dict] | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"tag": tag, "include": include}
    return entry | ({"exclude": exclude} if exclude else {}) | {"prompt": prompt}


def _clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def _one(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    if name in PLURALS:
        return PLURALS[name]
    return f"{name}es" if name.endswith(("s", "ch", "sh")) else f"{name}s"
