"""The terminal view of a row that is being sampled."""

from io import StringIO

import torch
from rich.console import Console

from common.data.tokenizer import ByteTokenizer
from common.generation.denoising_view import DenoisingView

TOKENS = 128


def test_the_view_shows_masks_and_new_tokens():
    console = Console(file=StringIO(), force_terminal=True, width=60)
    with DenoisingView(ByteTokenizer(), TOKENS, console) as view:
        view(torch.tensor([4, 2]), torch.tensor([[128] * 4, [72, 128, 105, 128]]))
        text = view.render([72, 128, 105, 33], [72, 128, 128, 128])
        assert text.plain == "H░i!"
        assert [(span.start, span.end, span.style) for span in text.spans] == [(1, 2, "dim"), (2, 4, "bold green")]
        view(torch.tensor([4, 2]), torch.tensor([[128] * 4, [72, 101, 105, 33]]))
    shown = console.file.getvalue()
    assert "row 2" in shown
    assert "4 of 4 tokens" in shown
