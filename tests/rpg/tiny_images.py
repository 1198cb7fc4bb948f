"""A folder of random images, one colour per class, as ImageNet lies on disk; and a recipe that learns it in seconds."""

from pathlib import Path

import numpy as np
from PIL import Image

from common.conversion import from_config
from rpg.zoo.recipes import Recipe

COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


def write_images(root: Path, *, train: int = 8, test: int = 4, size: int = 36) -> Path:
    """``root/{train,val}/class{0,1,2}/*.png``."""
    draws = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for label, colour in enumerate(COLOURS):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + draws.normal(0, 60, (size, size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def tiny_recipe(root: Path | str, **changed) -> Recipe:
    """CNNSmall on the folder: 24 training images, batches of 8."""
    options = {
        "name": "tiny",
        "network": {"name": "cnn_small", "num_classes": 3},
        "data": {"name": "folder", "root": str(root), "size": 32, "augmentation": "randaugment"},
        "training": {"batch_size": 8, "precision": "fp32", "lr": 0.01, "epochs": 2, "head_epochs": 1, "save_lr": 0.001},
        "saving": {"count": 2},
    }
    for name, value in changed.items():
        options[name] = {**options.get(name, {}), **value} if isinstance(value, dict) else value
    return from_config(Recipe, options, "recipe")
