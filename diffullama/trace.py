"""One self-contained HTML page on which texts are denoised step by step.

The page holds the pieces of text with the call that revealed each, and a few lines of script that show them; it loads
nothing. Without scripts it shows the finished texts. In the terminal: ``common/generation/denoising_view.py``.

Dimensions: L positions.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import Tensor

from common.data.tokenizer import Tokenizer
from common.diffusion.reveal import AFTER_STOP, GIVEN
from common.errors import DataError

MASK_SIGN = "\N{LIGHT SHADE}"
CONTEXT_TOKENS = 3  # tokens decoded before a piece, since some tokenizers drop the space at the beginning of a text
LONGEST_PIECE = 6  # tokens of one character at most

STYLE = """
:root { color-scheme: light dark; --line: #d9dde3; --soft: #59636e; --new: #0a7a3d; --given: #1f5fbf; }
@media (prefers-color-scheme: dark) { :root { --line: #39424e; --soft: #9aa4b0; --new: #4cc87e; --given: #6ea8fe; } }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 1000px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 20px; } h2 { font-size: 14px; color: var(--soft); margin: 0 0 6px; font-weight: 600; }
#controls { position: sticky; top: 0; background: Canvas; padding: 8px 0; border-bottom: 1px solid var(--line); }
#controls * { vertical-align: middle; margin-right: 10px; } input[type=range] { width: min(420px, 50vw); }
section { border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; margin: 14px 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 14px/1.6 ui-monospace, monospace; }
.mask { color: var(--line); } .given { color: var(--given); } .new { color: var(--new); font-weight: 700; }
.soft { color: var(--soft); font-size: 13px; }
"""

SCRIPT = """
"use strict";
const texts = JSON.parse(document.getElementById("data").textContent);
const frames = Math.max(...texts.map(t => t.frames));
const slider = document.getElementById("call"), play = document.getElementById("play");
const speed = document.getElementById("speed"), count = document.getElementById("count");
slider.max = frames; let timer = null;
const boxes = texts.map((text, i) => {
  const box = document.getElementById("text" + i); box.textContent = "";
  return text.pieces.map(() => box.appendChild(document.createElement("span")));
});
function show(call) {
  slider.value = call; count.textContent = "call " + call + " of " + frames;
  texts.forEach((text, i) => text.pieces.forEach(([piece, revealed, tokens], j) => {
    const span = boxes[i][j], visible = revealed < call;
    span.textContent = visible ? piece : MASK.repeat(tokens);
    span.className = !visible ? "mask" : revealed < 0 ? "given" : revealed === call - 1 ? "new" : "";
  }));
}
function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
function start() {
  if (+slider.value >= frames) show(0);
  play.textContent = "Pause";
  timer = setInterval(() => { if (+slider.value >= frames) stop(); else show(+slider.value + 1); }, +speed.value);
}
play.onclick = () => timer ? stop() : start();
slider.oninput = () => { if (timer) stop(); show(+slider.value); };
speed.onchange = () => { if (timer) { stop(); start(); } };
show(0); start();
"""


@dataclass(frozen=True)
class TracedText:
    """One text and when its tokens appeared.

    Attributes:
        title: above the text.
        pieces: (text, call that revealed it or -1 if given, number of tokens), from left to right.
        calls: calls of this text.
    """

    title: str
    pieces: Sequence[tuple[str, int, int]]
    calls: int


def traced_text(title: str, tokens_L: Tensor, revealed_L: Tensor, tokenizer: Tokenizer | None) -> TracedText:
    """A finished row (``absorbing.FinishedRow``) as pieces of text; those behind the end appear with the last call."""
    calls = int(revealed_L.max()) + 1 if len(revealed_L) else 0
    shown = [calls - 1 if call == AFTER_STOP else call for call in revealed_L.tolist()]
    pieces = []
    for start, end, text in split_text(tokens_L.tolist(), tokenizer):
        pieces.append((text, max(shown[start:end], default=GIVEN), end - start))
    return TracedText(title, pieces, calls)


def split_text(ids: Sequence[int], tokenizer: Tokenizer | None) -> list[tuple[int, int, str]]:
    """(start, end, text) of consecutive pieces: single tokens, or as many as one character takes."""
    if tokenizer is None:
        return [(i, i + 1, f"{token} ") for i, token in enumerate(ids)]

    def decode(part: Sequence[int]) -> str:
        return tokenizer.decode([token for token in part if token < tokenizer.vocab_size])  # an added mask has no text

    pieces, start = [], 0
    for end in range(1, len(ids) + 1):
        context = ids[max(0, start - CONTEXT_TOKENS) : start]
        before, text = decode(context), decode([*context, *ids[start:end]])
        text = text[len(before) :] if text.startswith(before) else decode(ids[start:end])
        is_cut = text.endswith("\N{REPLACEMENT CHARACTER}") and end - start < LONGEST_PIECE and end < len(ids)
        if not is_cut:
            pieces.append((start, end, text))
            start = end
    return pieces


def animation(texts: Iterable[TracedText], title: str = "Denoising", note: str = "") -> str:
    """The page; every text starts at call 0, all play together."""
    texts = list(texts)
    data = [{"frames": text.calls, "pieces": list(text.pieces)} for text in texts]
    # "</" would end the script element early
    embedded = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    sections = "\n".join(
        f'<section><h2>{escape(text.title)}</h2><pre id="text{number}">'
        f"{escape(''.join(piece for piece, _, _ in text.pieces))}</pre></section>"
        for number, text in enumerate(texts)
    )
    script = SCRIPT.replace("MASK", json.dumps(MASK_SIGN))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1><p class="soft">{escape(note)}</p>
<div id="controls"><button id="play">Play</button><input type="range" id="call" min="0" value="0" aria-label="call">
<span id="count" class="soft"></span>
<label class="soft">milliseconds per call <input id="speed" type="number" value="120" min="10" step="10"></label></div>
{sections}
<script type="application/json" id="data">{embedded}</script>
<script>{script}</script></body></html>
"""


def write_animation(path: str | Path, page: str) -> Path:
    """Writes the page. Raises: DataError if the file cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"animation={path} cannot be written ({error.strerror}); choose another file.") from error
    return path
