"""CLIP of transformers: normalised embeddings of images and texts.

Dimensions: B images or texts, D channels of the embedding.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from common.errors import CheckpointError

VIT_B_32, VIT_L_14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"


class Clip:
    """A frozen CLIP.

    Args:
        source: local folder or hub name.

    Raises: CheckpointError if it cannot be loaded.
    """

    def __init__(self, source: str, device: torch.device, *, option: str = "clip.model") -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self._model = CLIPModel.from_pretrained(source).to(device).eval().requires_grad_(False)
            self._processor = CLIPProcessor.from_pretrained(source)
        except Exception as error:  # connection, gating, damaged and unknown files: many types, one remedy
            raise CheckpointError(
                f"{option}={source} cannot be loaded as CLIP ({str(error).splitlines()[0][:200]}); give a local folder "
                "in transformers' format or a hub name."
            ) from error
        self.source, self._device = source, device

    @property
    def scale(self) -> float:
        """exp(logit_scale): 100 for OpenAI's models."""
        return float(self._model.logit_scale.exp())

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors ``(B, D)``, float32."""
        pixels = self._processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return _unit(self._model.get_image_features(pixel_values=pixels.to(self._device)).pooler_output)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``(B, D)``, float32; texts are cut to the model's length."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        inputs = {name: tokens[name].to(self._device) for name in ("input_ids", "attention_mask")}
        return _unit(self._model.get_text_features(**inputs).pooler_output)


def _unit(embedding_BD: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embedding_BD.float(), dim=-1)
