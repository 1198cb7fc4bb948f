"""Mask2Former of transformers as the detector.

Queries are ranked by class probability as mmdetection does, which GenEval was published with: all pairs of query and
class compete for 100 places, scores are multiplied by the mean probability inside the mask, and boxes enclose masks.

Dimensions: Q queries, K classes, H, W rows and columns of pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import CheckpointError
from mup_dit.geneval.detection import Detection, Detections
from mup_dit.geneval.prompts import CLASSES

DEFAULT = "facebook/mask2former-swin-small-coco-instance"
PLACES = 100


class Mask2FormerDetector:
    """Objects with masks.

    Args:
        source: local folder or hub name of an instance segmentation model on COCO.

    Raises: CheckpointError if it cannot be loaded or knows other classes.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        try:
            self._processor = AutoImageProcessor.from_pretrained(source)
            model = Mask2FormerForUniversalSegmentation.from_pretrained(source)
        except Exception as error:  # connection, gating, damaged and unknown files: many types, one remedy
            raise CheckpointError(
                f"geneval.detector={source} cannot be loaded as Mask2Former ({str(error).splitlines()[0][:200]}); give "
                "a local folder in transformers' format or a hub name."
            ) from error
        if model.config.num_labels != len(CLASSES):
            raise CheckpointError(
                f"geneval.detector={source} knows {model.config.num_labels} classes; GenEval needs instance "
                f"segmentation of COCO's {len(CLASSES)}, for example {DEFAULT}."
            )
        self._model = model.to(device).eval().requires_grad_(False)
        self._device, self.name = device, source

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Detections]:
        images = [image.convert("RGB") for image in images]
        inputs = self._processor(images=images, return_tensors="pt").to(self._device)
        valid = inputs["pixel_mask"]
        output = self._model(pixel_values=inputs["pixel_values"], pixel_mask=valid)
        found = []
        for row, image in enumerate(images):
            masks_Qhw = output.masks_queries_logits[row]
            # smaller images of a batch are padded at the right and below; masks there belong to no pixel
            height, width = (
                round(int(valid[row].any(dim=axis).sum()) * masks_Qhw.shape[1 + place] / valid.shape[1 + place])
                for place, axis in ((0, 1), (1, 0))
            )
            logits_QK = output.class_queries_logits[row]
            found.append(select_objects(logits_QK, masks_Qhw[:, :height, :width], (image.height, image.width)))
        return found


def select_objects(logits_QK: Tensor, masks_Qhw: Tensor, size: tuple[int, int], places: int = PLACES) -> Detections:
    """Objects by class, best first.

    Args:
        logits_QK: class scores of the queries; the last column means no object.
        masks_Qhw: logits at the network's resolution.
        size: rows and columns of the image.
    """
    probability_QK = logits_QK.float().softmax(dim=-1)[:, :-1]
    score_P, place_P = probability_QK.flatten().topk(min(places, probability_QK.numel()))
    query_P, label_P = place_P // probability_QK.shape[1], place_P % probability_QK.shape[1]
    masks = torch.nn.functional.interpolate(
        masks_Qhw.float()[None, query_P], size=size, mode="bilinear", align_corners=False
    )[0]
    found: dict[str, list[Detection]] = {}
    for score, label, mask_HW in zip(score_P.tolist(), label_P.tolist(), masks, strict=True):
        inside_HW = mask_HW > 0
        if not inside_HW.any():
            continue
        confidence = score * float(mask_HW[inside_HW].sigmoid().mean())
        detection = Detection(enclosing_box(inside_HW), confidence, inside_HW.cpu().numpy())
        found.setdefault(CLASSES[label], []).append(detection)
    return {name: sorted(objects, key=lambda each: -each.score) for name, objects in found.items()}


def enclosing_box(inside_HW: Tensor) -> tuple[float, float, float, float]:
    """x0, y0 of the first pixels and x1, y1 one past the last."""
    rows = np.flatnonzero(inside_HW.any(dim=1).cpu().numpy())
    columns = np.flatnonzero(inside_HW.any(dim=0).cpu().numpy())
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
