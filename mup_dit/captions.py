"""Captions as PixArt-alpha prepares them: cleaning before T5, and size flags inside prompts.

Source: specification 5; the cleaning rules are those of DeepFloyd, which diffusers carries.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import ConfigError
from mup_dit.aspect_ratios import ASPECT_RATIO_512_TEST, Bucket, nearest_key

RATIO_FLAGS = ("--aspect_ratio", "--ar")
SIZE_FLAG = "--hw"


def clean_caption(text: str) -> str:
    """Lower case without links, markup, mentions, file names and advertising, as T5 saw captions in training.

    The rules are applied twice: the first pass uncovers what the second removes.
    """
    return _cleaner()._text_preprocessing([text], clean_caption=True)[0]


@functools.cache
def _cleaner():
    """diffusers' rules; the import takes seconds, so it waits for the first caption."""
    from diffusers import PixArtAlphaPipeline

    class Rules(PixArtAlphaPipeline):
        """The pipeline's text rules without its networks."""

        def __init__(self) -> None:
            """Nothing: cleaning needs no component."""

    return Rules()


@dataclass(frozen=True)
class SizedPrompt:
    """A prompt without its flags, and the size that they ask for.

    Attributes:
        text: up to the first flag; what follows a flag is dropped, as in the reference.
        bucket: height and width of the nearest bucket.
        ratio: its key, height by width.
        size: height and width asked for by ``--hw``; without it the bucket's.
    """

    text: str
    bucket: Bucket
    ratio: float
    size: Bucket


def parse_prompt(prompt: str, table: Mapping[str, Bucket] = ASPECT_RATIO_512_TEST) -> SizedPrompt:
    """Reads ``--ar H:W`` (or ``--aspect_ratio``) and ``--hw H:W``; no flag means a square.

    Raises: ConfigError if a side is 0.
    """
    text = prompt
    for flag in (*RATIO_FLAGS, SIZE_FLAG):
        text = text.split(flag)[0]
    sides = next((found for flag in RATIO_FLAGS if (found := _sides(prompt, flag))), (1, 1))
    key = nearest_key(sides[0] / sides[1], table)
    asked = _sides(prompt, SIZE_FLAG)
    return SizedPrompt(text, table[key], float(key), asked or table[key])


def _sides(prompt: str, flag: str) -> Bucket | None:
    found = re.search(rf"{flag}\s+(\d+):(\d+)", prompt)
    if found is None:
        return None
    height, width = int(found[1]), int(found[2])
    if not height or not width:
        raise ConfigError(f"{flag} {found[1]}:{found[2]} in {prompt!r} has a side of 0; give {flag} HEIGHT:WIDTH.")
    return height, width
