"""A terminal view of one row while it is sampled: masked positions as blocks, new tokens highlighted."""

from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from common.data.tokenizer import Tokenizer

BLOCK = "\N{LIGHT SHADE}"
CONTROL = "\N{MIDDLE DOT}"
REFRESHES_PER_SECOND = 12


class DenoisingView:
    """A context manager whose instance is an ``on_launch`` callback of a sampler.

    It follows the row with the smallest number in flight. Args: ``tokenizer`` (None shows ids), ``mask_id`` and the
    ``console`` to draw on (by default stderr, so that texts on stdout can be piped).
    """

    def __init__(self, tokenizer: Tokenizer | None, mask_id: int, console: Console | None = None) -> None:
        self._tokenizer, self._mask_id = tokenizer, mask_id
        self._live = Live(console=console or Console(stderr=True), refresh_per_second=REFRESHES_PER_SECOND)
        self._row, self._calls = -1, 0
        self._last: list[int] = []

    def __enter__(self) -> "DenoisingView":
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)
        if not self._live.console.is_terminal:
            self._live.console.print()  # a pipe gets the last frame only, without the end of its line

    def __call__(self, index_R: Tensor, tokens_RL: Tensor) -> None:
        row = int(index_R.min())
        tokens = tokens_RL[int(index_R.argmin())].tolist()
        if row != self._row:
            self._row, self._calls, self._last = row, 0, [self._mask_id] * len(tokens)
        self._calls += 1
        masked = tokens.count(self._mask_id)
        title = f"row {row} · call {self._calls} · {len(tokens) - masked} of {len(tokens)} tokens\n"
        self._live.update(Text(title, style="dim") + self.render(tokens, self._last))
        self._last = tokens

    def render(self, tokens: list[int], before: list[int]) -> Text:
        """``tokens`` as text; those that differ from ``before`` stand out."""
        text, start = Text(), 0
        while start < len(tokens):
            kind = self._kind(tokens[start], before[start])
            end = start
            while end < len(tokens) and self._kind(tokens[end], before[end]) == kind:
                end += 1
            run = tokens[start:end]
            text.append(BLOCK * len(run) if kind == "dim" else self._decode(run), style=kind)
            start = end
        return text

    def _kind(self, token: int, before: int) -> str:
        if token == self._mask_id:
            return "dim"
        return "" if token == before else "bold green"

    def _decode(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, ids)) + " "
        # control characters, which an untrained model writes too, would move the cursor
        return "".join(c if c.isprintable() or c == "\n" else CONTROL for c in self._tokenizer.decode(ids))
