"""What is to be sampled: a label or a prompt for every sample index, and the name of its file.

Everything here depends on the options alone, so that every process knows the whole plan.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.config import require_at_least, require_choice
from common.errors import ConfigError, DataError
from common.seeding import generator

LABEL_RULES = ("uniform", "balanced")
NAMES = ("index", "prompt")
LAYOUTS = ("flat", "geneval")
UNSAFE = re.compile(r"[/\\:*?\"<>|.\x00-\x1f]")


@dataclass(frozen=True)
class Request:
    """One sample: its condition, ``label`` or ``prompt``, and its file's name.

    Attributes:
        size: height and width in pixels that the prompt asks for; None: the model's own.
    """

    index: int
    file: str
    label: int | None = None
    prompt: str | None = None
    size: tuple[int, int] | None = None

    def record(self) -> dict[str, object]:
        """The manifest's line."""
        condition = {"label": self.label} if self.prompt is None else {"prompt": self.prompt}
        size = {} if self.size is None else {"height": self.size[0], "width": self.size[1]}
        return {"index": self.index, "file": self.file, **condition, **size}


def plan_labels(rule: Any, count: int, num_classes: int, seed: int) -> list[int]:
    """A label per sample.

    Args:
        rule: ``uniform``: drawn for each sample index; ``balanced``: 0, 1, ..., K-1, 0, ...; a number or a list of
            numbers, repeated; a ``.json`` file with a list.

    Raises: ConfigError for a rule or a label that does not exist, DataError for a file that cannot be read.
    """
    if isinstance(rule, str) and rule.endswith(".json"):
        rule = _read_json(Path(rule), "labels")
    if isinstance(rule, int):
        rule = [rule]
    if isinstance(rule, str):
        require_choice("labels", rule, LABEL_RULES)
        if rule == "balanced":
            return [index % num_classes for index in range(count)]
        return [
            int(torch.randint(num_classes, (), generator=generator(seed, "label", index))) for index in range(count)
        ]
    if not isinstance(rule, Sequence) or not rule or not all(isinstance(label, int) for label in rule):
        raise ConfigError(f"labels={rule!r} is no list of class numbers; use uniform, balanced, 7 or [0,1,2].")
    return [rule[index % len(rule)] for index in range(count)]


def read_prompts(source: Any) -> tuple[list[str], list[dict]]:
    """Prompts and, of each, what its file says besides.

    Args:
        source: a prompt, a list of prompts, or a file: ``.txt`` (one a line), ``.jsonl`` (objects with ``prompt``),
            ``.json`` (a list of texts or objects, a mapping of objects as MJHQ-30K's, or COCO's annotations).

    Raises: DataError for a file that cannot be read or holds no prompt.
    """
    if isinstance(source, str) and Path(source).suffix in (".txt", ".json", ".jsonl"):
        path = Path(source)
        if path.suffix == ".json":
            entries = _read_json(path, "prompts")
            if isinstance(entries, Mapping):
                entries = entries["annotations"] if "annotations" in entries else list(entries.values())
        else:
            lines = [line for line in _read_text(path, "prompts").splitlines() if line.strip()]
            entries = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
        where = str(path)
    else:
        entries, where = [source] if isinstance(source, str) else list(source), "prompts"
    prompts, details = [], []
    for number, entry in enumerate(entries):
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        text = entry.get("prompt", entry.get("caption")) if isinstance(entry, Mapping) else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: entry {number} holds no text under prompt or caption: {str(entry)[:80]!r}.")
        prompts.append(text.strip())
        details.append(dict(entry))
    if not prompts:
        raise DataError(f"{where} holds no prompts.")
    return prompts, details


def plan_requests(
    *,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    sizes: Sequence[tuple[int, int] | None] | None = None,
    samples_per_prompt: int = 1,
    suffix: str = ".png",
    names: str = "index",
    name_length: int = 100,
    layout: str = "flat",
) -> list[Request]:
    """The requests by index; with prompts, ``samples_per_prompt`` consecutive ones share a prompt.

    Args:
        sizes: height and width per prompt; None: the model's own.
        names: ``index``: 000000.png; ``prompt``: the prompt's first ``name_length`` characters, with characters that a
            path cannot hold (and dots) replaced by ``_``; a name met again gets its index as well.
        layout: ``geneval``: a folder per prompt, 00000/samples/00000.png.
    """
    require_choice("names", names, NAMES)
    require_choice("layout", layout, LAYOUTS)
    require_at_least("samples_per_prompt", samples_per_prompt, 1)
    if labels is not None:
        return [Request(index, f"{index:06d}{suffix}", label=label) for index, label in enumerate(labels)]
    requests: list[Request] = []
    taken: set[str] = set()
    for index in range(len(prompts) * samples_per_prompt):
        number, repeat = divmod(index, samples_per_prompt)
        file = f"{index:06d}{suffix}"
        if layout == "geneval":
            file = f"{number:05d}/samples/{repeat:05d}{suffix}"
        elif names == "prompt":
            stem = UNSAFE.sub("_", prompts[number])[:name_length]
            file = f"{stem}{suffix}" if f"{stem}{suffix}" not in taken else f"{stem}_{index:06d}{suffix}"
        taken.add(file)
        requests.append(Request(index, file, prompt=prompts[number], size=None if sizes is None else sizes[number]))
    return requests


def _read_text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option}={path} cannot be read: {error}.") from error


def _read_json(path: Path, option: str) -> Any:
    try:
        return json.loads(_read_text(path, option))
    except json.JSONDecodeError as error:
        raise DataError(f"{option}={path} is no JSON: {error}.") from error
