"""A sentence as a condition: the mean hidden state of a frozen language model.

An alternative to one YES/NO question per class: a generator trained on the features of task descriptions
(``rpg.extract_conditions kind=text``) takes those of a new sentence, whatever the number of classes.

Dimensions: N sentences, T tokens, F features.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import CheckpointError, DataError


class TextEncoder:
    """Hidden states of a model of transformers (decoder, encoder, or the encoder of a T5), averaged over tokens.

    Args:
        name: folder or hub name, e.g. ``Qwen/Qwen2.5-0.5B``.
        layer: of the hidden states; -1 is the last.
        max_tokens: longer sentences are cut.

    Raises: CheckpointError if nothing can be loaded.
    """

    def __init__(
        self, name: str, device: torch.device | str = "cpu", *, layer: int = -1, max_tokens: int = 256
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.name, self.device, self.layer, self.max_tokens = name, device, layer, max_tokens
        options = {"local_files_only": Path(name).is_dir()}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, **options)
            network = AutoModel.from_pretrained(name, use_safetensors=True, **options)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            lines = str(error).strip().splitlines() or [""]
            raise CheckpointError(
                f"encoder={name} could not be loaded ({type(error).__name__}: {lines[0][:160]}); give a folder or hub "
                "name of transformers with config.json, model.safetensors and the tokenizer's files."
            ) from None
        network = network.get_encoder() if getattr(network.config, "is_encoder_decoder", False) else network
        self.network = network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """features_NF, float32; a sentence's features do not depend on the others, which are not padded together."""
        return torch.stack([self._encode(sentence) for sentence in sentences])

    def _encode(self, sentence: str) -> Tensor:
        encoded = self.tokenizer(sentence, return_tensors="pt", truncation=True, max_length=self.max_tokens)
        if not encoded["input_ids"].numel():
            raise DataError(f"the text {sentence!r} has no tokens; describe what is wanted.")
        output = self.network(
            input_ids=encoded["input_ids"].to(self.device),
            attention_mask=encoded["attention_mask"].to(self.device),
            output_hidden_states=True,
        )
        return output.hidden_states[self.layer][0].float().mean(dim=0).cpu()


def text_condition(encoder: TextEncoder, sentence: str) -> Tensor:
    """Condition of a sentence: its features scaled to a root mean square of one; (F,)."""
    features_F = encoder([sentence])[0]
    return F.normalize(features_F, dim=0) * math.sqrt(len(features_F))
