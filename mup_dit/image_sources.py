"""Folders of images in the layouts of ImageNet, SA-1B, MS-COCO and MJHQ-30K.

Source: specification 7.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.data.fingerprint import text_fingerprint
from common.errors import DataError
from mup_dit.batches import Batch

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FEATURE_FOLDER = "caption_feature_wmask"  # SA-1B: caption features as PixArt-alpha stores them


class FolderSource:
    """Files below one folder.

    Args:
        files: paths relative to ``root``; kept as one array of bytes, because SA-1B has eleven million.
        label_N: class of each.
        captions: of each.
        feature_folder: folder below ``root`` with ``<stem>.npz`` of ``caption_feature`` and ``attention_mask``.
        caption_folder: folder below ``root`` with ``<stem>.txt``.
        latent_folder: folder below ``root`` with ``<stem>.npy``, which then stand in for the images.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        *,
        label_N: Sequence[int] | None = None,
        classes: tuple[str, ...] | None = None,
        captions: Sequence[str] | None = None,
        feature_folder: str | None = None,
        caption_folder: str | None = None,
        latent_folder: str | None = None,
    ) -> None:
        self.name, self.root, self.classes = name, Path(root), classes
        self._files = np.array([file.encode() for file in files], dtype=np.bytes_)
        self._label_N = None if label_N is None else np.asarray(label_N, np.int64)
        self._captions = None if captions is None else list(captions)
        self._feature_folder, self._caption_folder = feature_folder, caption_folder
        self._latent_folder = latent_folder

    def __len__(self) -> int:
        return len(self._files)

    def file(self, row: int) -> str:
        """Path relative to the root."""
        return bytes(self._files[row]).decode()

    def where(self, row: int) -> str:
        return str(self.root / self.file(row))

    def open(self, row: int) -> Image.Image:
        return Image.open(self.root / self.file(row))

    def label(self, row: int) -> int | None:
        return None if self._label_N is None else int(self._label_N[row])

    def caption(self, row: int) -> str | None:
        if self._captions is not None:
            return self._captions[row]
        if self._caption_folder is None:
            return None
        path = self.root / self._caption_folder / f"{Path(self.file(row)).stem}.txt"
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the caption cannot be read ({error}).") from None

    def features(self, row: int) -> Batch | None:
        """Raises: DataError naming a feature file that is missing or broken."""
        if self._feature_folder is None:
            return None
        path = self.root / self._feature_folder / f"{Path(self.file(row)).stem}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                caption, mask = stored["caption_feature"], stored["attention_mask"]
        except FileNotFoundError:
            raise DataError(
                f"{path} is missing: the caption of {self.file(row)} has no features. Make them with "
                "`python -m mup_dit.extract`, or encode captions while training with data.text."
            ) from None
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} holds no caption_feature and attention_mask ({error}); make it again.") from None
        caption_1TY = torch.from_numpy(np.asarray(caption)).reshape(1, *caption.shape[-2:])
        return {"caption": caption_1TY, "mask": torch.from_numpy(np.asarray(mask)).reshape(-1).to(torch.int64)}

    def latent(self, row: int) -> Batch | None:
        """``mean`` and ``std`` (C, S, S) stored with the image; None if images are to be read.

        Raises: DataError naming a latent file that is missing or broken.
        """
        if self._latent_folder is None:
            return None
        path = self.root / self._latent_folder / f"{Path(self.file(row)).stem}.npy"
        try:
            mean, std = np.split(np.load(path, allow_pickle=False), 2)
        except FileNotFoundError:
            raise DataError(
                f"{path} is missing: {self.file(row)} has no latent. `python -m mup_dit.extract layout=files` makes it."
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} holds no mean and standard deviation ({error}); make it again.") from None
        return {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}

    def fingerprint(self) -> str:
        """Of names, labels and captions; the images themselves are not read."""
        labels = None if self._label_N is None else self._label_N.tobytes().hex()
        return text_fingerprint(self._files.tobytes().hex(), labels, self._captions)


def image_folder(root: Path, split: str) -> FolderSource:
    """One folder per class, names sorted; ``root/<split>`` where there is one (``val`` counts as validation).

    Raises: DataError if there are no class folders with images.
    """
    aliases = (split, "val") if split == "validation" else (split,)
    base = next((root / name for name in aliases if (root / name).is_dir()), root)
    if split != "train" and base == root:
        raise DataError(f"{root} has no folder {split}; make one, or choose another split.")
    classes = tuple(sorted(entry.name for entry in _scan(base) if entry.is_dir()))
    files, labels = [], []
    for label, name in enumerate(classes):
        found = _images_below(base / name)
        files += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
    if not files:
        raise DataError(
            f"{base} holds no images in class folders; expected {base}/<class>/<image> with "
            f"{', '.join(IMAGE_SUFFIXES)}."
        )
    return FolderSource(f"imagefolder:{base}", base, files, label_N=labels, classes=classes)


def latent_folder(size: int) -> str:
    """Name of the folder with latents of images of ``size`` pixels."""
    return f"vae_features_{size}"


def sa1b(root: Path, split: str, *, latents_of: int | None = None) -> FolderSource:
    """``images/<stem>.jpg`` named by the lists ``partition/*.txt``; a split other than ``train`` is one list's name.

    Captions are ``captions/<stem>.txt`` or, already encoded, ``caption_feature_wmask/<stem>.npz``.

    Args:
        latents_of: side in pixels of the images whose latents (``vae_features_<side>/``) are read in their place.

    Raises: DataError if lists are missing or empty.
    """
    folder = root / "partition"
    lists = sorted(folder.glob("*.txt")) if split == "train" else [folder / f"{split.removesuffix('.txt')}.txt"]
    if not lists or not all(path.is_file() for path in lists):
        raise DataError(f"{folder} holds no list {'*' if split == 'train' else split}.txt of image stems, one a line.")
    stems = [line.strip() for path in lists for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    # some lists carry the suffix
    files = [f"images/{stem if stem.endswith(IMAGE_SUFFIXES) else f'{stem}.jpg'}" for stem in stems]
    return FolderSource(
        f"sa1b:{root}",
        root,
        files,
        feature_folder=FEATURE_FOLDER if (root / FEATURE_FOLDER).is_dir() else None,
        caption_folder="captions" if (root / "captions").is_dir() else None,
        latent_folder=None if latents_of is None else latent_folder(latents_of),
    )


def coco(root: Path, split: str) -> FolderSource:
    """One row per image of ``annotations/captions_<split>.json``, with its first caption.

    Images are in ``root/<split>`` or ``root/images``; ``train`` and ``validation`` mean train2014 and val2014.

    Raises: DataError if the annotations are missing or are none.
    """
    part = {"train": "train2014", "validation": "val2014"}.get(split, split)
    path = root / "annotations" / f"captions_{part}.json"
    content = _read_json(path)
    try:
        names = {entry["id"]: entry["file_name"] for entry in content["images"]}
        first: dict[int, tuple[int, str]] = {}
        for entry in content["annotations"]:
            number, image = entry["id"], entry["image_id"]
            if image in names and (image not in first or number < first[image][0]):
                first[image] = number, entry["caption"].strip()
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no caption file of COCO: {type(error).__name__} {error}.") from None
    folder = next((name for name in (part, "images") if (root / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{root} has neither {part}/ nor images/ with the images of {path.name}.")
    images = sorted(first)
    return FolderSource(
        f"coco:{root}",
        root,
        [f"{folder}/{names[image]}" for image in images],
        captions=[first[image][1] for image in images],
    )


def mjhq(root: Path, split: str) -> FolderSource:
    """MJHQ-30K: ``meta_data.json`` maps an image's stem to category and prompt; files are ``<category>/<stem>.jpg``.

    There is one part only. Categories are the labels.

    Raises: DataError if the list is missing or is none.
    """
    path = root / "meta_data.json"
    content = _read_json(path)
    try:
        entries = [(stem, str(entry["category"]), str(entry["prompt"])) for stem, entry in content.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no list of MJHQ-30K: {type(error).__name__} {error}.") from None
    below = "mjhq30k_imgs/" if (root / "mjhq30k_imgs").is_dir() else ""
    classes = tuple(sorted({category for _, category, _ in entries}))
    numbers = {name: number for number, name in enumerate(classes)}
    return FolderSource(
        f"mjhq:{root}",
        root,
        [f"{below}{category}/{stem}.jpg" for stem, category, _ in entries],
        label_N=[numbers[category] for _, category, _ in entries],
        classes=classes,
        captions=[prompt for _, _, prompt in entries],
    )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable JSON ({error}).") from None


def _scan(folder: Path) -> list[os.DirEntry]:
    try:
        return list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}.") from None


def _images_below(folder: Path) -> list[str]:
    """Paths of images at any depth, relative to ``folder``, sorted."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path.relative_to(folder).as_posix() for path in found)
