"""Mask2Former's output as detections, and colours of crops."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import CheckpointError
from mup_dit.geneval.colours import ColourClassifier, crop_object
from mup_dit.geneval.detection import Detection
from mup_dit.geneval.mask2former import Mask2FormerDetector, select_objects
from mup_dit.geneval.prompts import CLASSES, COLOURS
from mup_dit.metrics.clip import Clip
from tests.mup_dit.tiny_hub_models import save_clip, save_mask2former

CPU = torch.device("cpu")


def picture(width: int = 30, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_objects_are_ranked_by_class_and_mask():
    logits_QK = torch.full((2, 81), -20.0)
    logits_QK[0, 15], logits_QK[1, 16] = 20.0, 20.0  # a cat, a dog
    masks_Qhw = torch.full((2, 8, 8), -20.0)
    masks_Qhw[0, 2:4, 4:8] = 20.0
    masks_Qhw[1, :, :2] = 0.5  # an unsure mask
    found = select_objects(logits_QK, masks_Qhw, (8, 8), places=2)
    (cat,), (dog,) = found["cat"], found["dog"]
    assert cat.box == (4, 2, 8, 4) and cat.score == pytest.approx(1.0, abs=1e-4)
    assert dog.box == (0, 0, 2, 8) and dog.score == pytest.approx(torch.tensor(0.5).sigmoid().item(), abs=1e-4)
    assert cat.mask.sum() == 8


def test_a_local_folder_detects_in_images_of_several_sizes(tmp_path):
    detector = Mask2FormerDetector(str(save_mask2former(tmp_path)), CPU)
    alone, other = detector([picture()]), detector([picture(), picture(40, 50)])
    for image, found in zip([picture(), picture(40, 50)], other, strict=True):
        assert found and found.keys() <= set(CLASSES)
        for each in (each for objects in found.values() for each in objects):
            assert each.mask.shape == (image.height, image.width)
            assert 0 <= each.box[0] < each.box[2] <= image.width and 0 <= each.box[1] < each.box[3] <= image.height
    assert {name: objects[0].box for name, objects in alone[0].items()} == {
        name: objects[0].box for name, objects in other[0].items()
    }


def test_a_detector_of_other_classes_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="7 classes"):
        Mask2FormerDetector(str(save_mask2former(tmp_path, num_labels=7)), CPU)
    with pytest.raises(CheckpointError, match=r"geneval\.detector="):
        Mask2FormerDetector(str(tmp_path / "missing"), CPU)


def test_colours_are_read_from_the_object_alone(tmp_path):
    mask = np.zeros((20, 30), bool)
    mask[5:15, 10:20] = True
    detection = Detection((8.0, 4.0, 22.0, 16.0), 0.9, mask)
    red = Image.new("RGB", (30, 20), "red")
    crop = np.asarray(crop_object(red, detection))
    assert crop.shape == (12, 14, 3)
    assert (crop[1:11, 2:12] == (255, 0, 0)).all() and (crop[0] == 0x99).all() and (crop[:, :2] == 0x99).all()
    classify = ColourClassifier(Clip(str(save_clip(tmp_path)), CPU))
    found = classify(red, [detection, detection], "cat")
    assert found[0] == found[1] in COLOURS
    assert classify(red, [], "cat") == []
