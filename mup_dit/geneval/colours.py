"""The colour of objects, by CLIP without training.

Source: specification 6 (GenEval): the crop of the box with everything outside the mask grey (#999), compared with
three descriptions of each of ten colours.

Dimensions: C colours, D channels of CLIP's embedding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mup_dit.geneval.detection import Detection
from mup_dit.geneval.prompts import COLOURS
from mup_dit.metrics.clip import Clip

BACKGROUND = "#999"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class ColourClassifier:
    """Names the colour of detected objects."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._embeddings: dict[str, Tensor] = {}

    def __call__(self, image: Image.Image, detections: Sequence[Detection], name: str) -> list[str]:
        """One of ``COLOURS`` for each detection of class ``name``."""
        if not detections:
            return []
        crops = [crop_object(image, detection) for detection in detections]
        likeness = self._clip.embed_images(crops) @ self._colours(name).T
        return [COLOURS[index] for index in likeness.argmax(dim=-1).tolist()]

    def _colours(self, name: str) -> Tensor:
        """Unit vectors ``(C, D)``: of each colour the mean over descriptions."""
        if name not in self._embeddings:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            embedding = self._clip.embed_texts(texts).unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(dim=1)
            self._embeddings[name] = torch.nn.functional.normalize(embedding, dim=-1)
        return self._embeddings[name]


def crop_object(image: Image.Image, detection: Detection) -> Image.Image:
    """The box's pixels, grey outside the mask."""
    image = image.convert("RGB")
    if detection.mask is not None:
        inside = Image.fromarray(np.asarray(detection.mask, bool))
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), inside)
    return image.crop(tuple(detection.box))
