"""Images with their labels or captions, as batches of tensors; by name.

======================  ==============================================================================================
``digits``              scikit-learn's handwritten digits, 8 x 8, embedded: 1536 to train on, 261 to validate
``imagefolder:DIR``     one folder per class (ImageNet); ``DIR/<split>`` where there is one
``sa1b:DIR``            SA-1B as PixArt-alpha keeps it: ``images/``, ``partition/*.txt``, captions or caption features
``sa1b_latents:DIR``    the same with ``vae_features_<size>/<stem>.npy`` (mean and standard deviation) for the images
``coco:DIR``            MS-COCO: ``annotations/captions_<split>.json`` with ``<split>/`` or ``images/``
``mjhq:DIR``            MJHQ-30K: ``meta_data.json`` with one folder per category
``npz:FILE``            ``arr_0`` uint8 (N, H, W, C), as samplers write it; labels in ``arr_1``, ``labels`` or ``label``
``hf:NAME_OR_FOLDER``   a data set of the ``datasets`` library: hub name, ``save_to_disk`` folder, parquet files
``webdataset:PATTERN``  tar shards with ``.jpg|.png|.webp`` and ``.cls``, ``.txt`` or ``.json``
``features:DIR``        cached latents and caption features (``python -m mup_dit.extract``)
======================  ==============================================================================================

Rows are all there is to a data set: order, batches and position are the loader's (``common.data.loader``). What a batch
holds: ``mup_dit.batches``.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from mup_dit.array_dataset import digit_captions, load_digits_split, load_npz
from mup_dit.batches import ON_ERROR, ImageDataset, TextEncoder
from mup_dit.file_dataset import FileDataset, ImageSource
from mup_dit.hub_images import hub_images, webdataset_shards
from mup_dit.image_sources import coco, image_folder, mjhq, sa1b
from mup_dit.images import CROPS
from mup_dit.small_text import SmallTextEncoder

KINDS = ("digits", "imagefolder", "sa1b", "sa1b_latents", "coco", "mjhq", "npz", "hf", "webdataset", "features")


def build_dataset(
    name: str,
    split: str = "train",
    *,
    size: int,
    channels: int | None = None,
    text: TextEncoder | Literal["small"] | None = None,
    flips: bool = False,
    crop: str = "adm",
    on_error: str = "stop",
) -> ImageDataset:
    """The data set called ``name`` (see the module's table).

    Args:
        split: ``train`` or ``validation``, or a folder's or a hub data set's own name for a part.
        size: side of the images in pixels; of cached latents it is not used.
        channels: 3 or 1; None: 3, of digits 1.
        text: encodes captions while loading; ``small`` is made from the data's own captions, 8 tokens of 32 channels.
            None: batches hold labels, or no condition where there are captions only.
        flips: as many rows again, mirrored: what a random flip draws from, without a random number.
        crop: ``adm``, ``pixart`` or ``none``.
        on_error: a missing or broken file ``stop``s with its name, or the row is replaced by the next one that can be
            read, with a warning that names the file (``skip``).

    Raises: ConfigError for a name or option that is not known; DataError if there is nothing to read.
    """
    require_at_least("size", size, 1)
    require_choice("data.crop", crop, CROPS)
    require_choice("data.on_error", on_error, ON_ERROR)
    kind, _, where = str(name).partition(":")
    require_choice("data name", kind, KINDS)
    if not where and kind != "digits":
        raise ConfigError(f"data name {name!r} lacks a place; write {kind}:PLACE, for example {kind}:data.")
    if kind == "digits":
        encoder = SmallTextEncoder.train(digit_captions()) if text == "small" else text
        return load_digits_split(split, size=size, channels=channels or 1, flips=flips, text=encoder)
    if kind == "npz":
        if text is not None:
            raise ConfigError(f"{name} has no captions that a text encoder could encode; leave data.text out.")
        return load_npz(where, size=size, channels=channels or 3, flips=flips)
    if kind == "features":
        from mup_dit.feature_dataset import FeatureDataset

        return FeatureDataset(where, split, flips=flips)
    if kind == "sa1b_latents":
        if flips:
            raise ConfigError(f"data.flips=true, but mirrored images cannot be made from the latents of {name}.")
        source = sa1b(Path(where), split, latents_of=size)
    else:
        source = _READERS[kind](where, split)
    encoder = SmallTextEncoder.train(_captions(source)) if text == "small" else text
    return FileDataset(
        source,
        size=size,
        channels=channels or 3,
        crop=crop,
        text=encoder,
        flips=flips,
        on_error=on_error,
    )


def _captions(source: ImageSource) -> Iterator[str]:
    for row in range(len(source)):
        caption = source.caption(row)
        if caption is None:
            raise ConfigError(f"{source.name} has no captions that a text encoder could encode; leave data.text out.")
        yield caption


_READERS: dict[str, Callable[[str, str], ImageSource]] = {
    "imagefolder": lambda where, split: image_folder(Path(where), split),
    "sa1b": lambda where, split: sa1b(Path(where), split),
    "coco": lambda where, split: coco(Path(where), split),
    "mjhq": lambda where, split: mjhq(Path(where), split),
    "hf": hub_images,
    "webdataset": webdataset_shards,
}
