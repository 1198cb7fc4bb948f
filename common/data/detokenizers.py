"""Detokenizers that undo the spacing of tokenized corpora before text is encoded again.

The order of the rules is part of the definition, and so are the texts that they damage (apostrophes paired across
words, the space lost after a plural possessive): published perplexities were computed with exactly these.

Source: RADD's released data code (section 6.2 of the specification); exact pairs in the golden case ``detokenizers``.
"""

import re
from collections.abc import Callable

from common.errors import ConfigError

Detokenizer = Callable[[str], str]


def wikitext_detokenizer(text: str) -> str:
    """Text of WikiText-2 and WikiText-103 without its token spacing."""
    text = text.replace("s '", "s'")
    # Meant to join an apostrophe and a digit, but the slashes are literal: it matches no prose, and what it matches
    # becomes the pattern's own text. Kept for parity.
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text)
    for spaced, joined in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(spaced, joined)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    text = re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", text)
    text = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", text)
    text = re.sub(r"\{\s*([^\}]*?)\s*\}", r"{\1}", text)
    text = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', text)
    text = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", text)
    for spaced, joined in (
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" ° ", "°"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ):
        text = text.replace(spaced, joined)
    return text


def ptb_detokenizer(text: str) -> str:
    """Text of the Penn Treebank; its number placeholder N becomes 1, its <unk> a question mark."""
    for spaced, joined in ((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")):
        text = text.replace(spaced, joined)
    for _ in range(10):  # neighbours share a space: "N N N" needs more than one pass
        text = text.replace(" N ", " 1 ")
    return text.replace("$ 1", "$1").replace("# 1", "#1").replace("<unk>", "?")


def lm1b_detokenizer(text: str) -> str:
    """Text of the One Billion Word benchmark."""
    text = text.replace("http : / / ", "http://").replace("https : / / ", "https://")
    text = re.sub(r" '(\w+)", r"'\1", text)
    text = re.sub(r" (\w+) \. ", r" \1. ", text)
    text = re.sub(r" (\w+) \.$", r" \1.", text)
    text = re.sub(r" \?$", "?", text.replace(" ? ", "? "))
    text = re.sub(r" !$", "!", text.replace(" ! ", "! "))
    for spaced, joined in ((" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")):
        text = text.replace(spaced, joined)
    text = re.sub(r"\" ([^\"]+) \"", r'"\1"', text)
    text = re.sub(r"' ([^']+) '", r"'\1'", text)
    text = re.sub(r"\( ([^\(\)]+) \)", r"(\1)", text)
    text = re.sub(r"\[ ([^\[\]]+) \]", r"[\1]", text)
    return text.replace("$ ", "$").replace("£ ", "£")


def lambada_detokenizer(text: str) -> str:
    """Text of LAMBADA with straight double quotes, stripped, on a line of its own."""
    return (
        "\n"
        + text.replace("\N{LEFT DOUBLE QUOTATION MARK}", '"').replace("\N{RIGHT DOUBLE QUOTATION MARK}", '"').strip()
    )


DETOKENIZERS: dict[str, Detokenizer] = {
    "wikitext": wikitext_detokenizer,
    "ptb": ptb_detokenizer,
    "lm1b": lm1b_detokenizer,
    "lambada": lambada_detokenizer,
}


def find_detokenizer(name: str | None, dataset: str) -> tuple[str, Detokenizer | None]:
    """Name and function of the detokenizer to use.

    Args:
        name: ``"auto"`` goes by the dataset's name (wikitext*, ptb, lm1b, lambada; others none); None or ``"none"``
            leaves text alone; otherwise a key of ``DETOKENIZERS``.
        dataset: the dataset's name.

    Raises:
        ConfigError: another name.
    """
    if name is None or name == "none":
        return "none", None
    if name == "auto":
        name = next((known for known in DETOKENIZERS if dataset.lower().startswith(known)), "none")
        return name, DETOKENIZERS.get(name)
    if name not in DETOKENIZERS:
        raise ConfigError(f"detokenizer={name!r} must be auto, none or one of {', '.join(DETOKENIZERS)}.")
    return name, DETOKENIZERS[name]
