"""Tests adapters of a language model on held-out text: loss per token and share of next tokens predicted.

Dimensions: N rows of text, L tokens of a row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.conversion import from_config
from common.errors import ConfigError
from rpg.lora_collection import with_model
from rpg.lora_config import AdapterSection
from rpg.lora_model import (
    AdapterText,
    build_adapted_model,
    check_vocabulary,
    compute_score,
    forward_precision,
    load_adapter_state,
    predictions,
)
from rpg.testing import State
from rpg.zoo.testers import read_recipe


class AdapterTester:
    """Tests states of adapters, by the names of peft or of the DoRA fork.

    Args:
        collection: folder of a collection of adapters, which knows model, text and rank.
        adapters: options of ``recipe.adapters`` instead, or besides to change some.
        device: None: the GPU if there is one.
    """

    def __init__(
        self,
        collection: str | None = None,
        *,
        adapters: Mapping[str, Any] | None = None,
        device: str | None = None,
    ) -> None:
        if collection is None and not adapters:
            raise ConfigError("AdapterTester needs one of the options collection=DIR and adapters={model: DIR}.")
        known = {} if collection is None else vars(read_recipe(collection).adapters)
        self.section = from_config(AdapterSection, {**known, **(adapters or {})}, "adapters")
        if collection is not None:
            self.section = with_model(self.section, Path(collection))
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._precision = forward_precision(self.section, self.device)
        self._model = build_adapted_model(self.section, 0, self.device)
        text = AdapterText(self.section)
        check_vocabulary(self._model, text, self.section)
        self._tokens_NL = text.rows_NL(text.test_rows).to(self.device)

    def score(self, state: State) -> tuple[float, float]:
        """(nats per token, share of tokens predicted right)."""
        load_adapter_state(self._model, state)
        return compute_score(self._model, self._tokens_NL, self.section.micro_size, self._precision)

    def predict(self, state: State) -> tuple[Tensor, Tensor]:
        """(predicted, right) next token of every position of the held-out text, flat."""
        load_adapter_state(self._model, state)
        parts = predictions(self._model, self._tokens_NL, self.section.micro_size, self._precision)
        return torch.cat([predicted_NL.flatten().cpu() for _, predicted_NL in parts]), (
            self._tokens_NL[:, 1:].flatten().cpu()
        )
