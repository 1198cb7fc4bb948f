"""Finished texts as records of a jsonl file and as a page of animations."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from common.data.tokenizer import Tokenizer
from common.diffusion.absorbing import FinishedRow
from common.diffusion.reveal import GIVEN
from common.generation.sample_file import SampleRecord
from common.provenance import git_revision
from diffullama.generate_config import GenerateConfig
from diffullama.requests import Request
from diffullama.special_tokens import SpecialTokens
from diffullama.trace import animation, traced_text


@dataclass(frozen=True, kw_only=True)
class PredictionRecord(SampleRecord):
    """One text and what of it is new.

    Attributes:
        prompt: number of the prompt.
        predict: the written tokens as text, up to the end of the text; None without a tokenizer.
        label: what the prompt file says should have been written, if it does.
        revealed: the call that revealed each token; -1: given, -2: after the end of the text.
    """

    prompt: int
    predict: str | None
    label: str | None
    revealed: list[int]


class RecordWriter:
    """Records and the page of finished rows.

    Args:
        settings: digest of the options that decide tokens.
        ends: tokens that end a text, besides the end-of-text token.
    """

    def __init__(
        self,
        config: GenerateConfig,
        requests: Sequence[Request],
        tokenizer: Tokenizer | None,
        special: SpecialTokens,
        settings: str,
        ends: Collection[int] = (),
    ) -> None:
        self._config, self._requests, self._settings = config, requests, settings
        self._tokenizer, self._special = tokenizer, special
        self._ends = {*ends, special.eos_id}
        self._revision = git_revision()
        self._steps = config.sampler_options().steps

    def to_record(self, row: FinishedRow) -> PredictionRecord:
        request = self._requests[row.index % len(self._requests)]
        tokens, revealed = row.tokens_L.tolist(), row.revealed_L.tolist()
        written = [token for token, call in zip(tokens, revealed) if call != GIVEN]
        return PredictionRecord(
            index=row.index,
            tokens=tokens,
            text=self._decode(tokens),
            method=f"{self._config.engine}:{self._config.order}",
            steps=self._steps,
            free=int(request.free_L.sum()),
            calls=row.calls,
            launches=row.launches,
            seconds=round(row.seconds, 6),
            seed=self._config.seed,
            settings=self._settings,
            git_revision=self._revision,
            prompt=row.index % len(self._requests),
            predict=self._decode(self._cut(written)),
            label=request.label,
            revealed=revealed,
        )

    def _cut(self, written: list[int]) -> list[int]:
        """Tokens before the first that ends the text, or before the padding at the end."""
        end = next((place for place, token in enumerate(written) if token in self._ends), len(written))
        written = written[:end]
        while written and written[-1] == self._special.pad_id:
            written = written[:-1]
        return written

    def _decode(self, tokens: list[int]) -> str | None:
        """Text without the begin-of-text token, and without ids that are no token of the tokenizer."""
        if self._tokenizer is None:
            return None
        if tokens and tokens[0] in (self._special.bos_id, self._special.eos_id):
            tokens = tokens[1:]
        limit = self._tokenizer.vocab_size
        return self._tokenizer.decode([token for token in tokens if token < limit])

    def page(self, records: Sequence[PredictionRecord]) -> str:
        """The animation of these records."""
        texts = [
            traced_text(
                f"text {record.index} · {record.free} tokens in {record.calls} network calls",
                torch.tensor(record.tokens),
                torch.tensor(record.revealed),
                self._tokenizer,
            )
            for record in records
        ]
        note = f"{self._config.model_path}, order {self._config.order}, seed {self._config.seed}"
        return animation(texts, "Texts while they are denoised", note)
