"""Golden cases of data; see ``golden_adapter``."""

import numpy as np
from PIL import Image

from mup_dit.images import center_crop


def _center_crop(case, config, inputs) -> dict[str, object]:
    return {
        name.replace("in", "out"): np.asarray(center_crop(Image.fromarray(pixels.numpy()), config["image_size"]))
        for name, pixels in inputs.items()
    }


KINDS: list = [(lambda case, config, inputs: {"image_size", "shapes"} <= config.keys(), _center_crop)]
