"""Tiny encoders with random weights in the hub's format, and folders of images in the published layouts."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WORDS = ("a", "handwritten", "digit", "zero", "one", "two", "cat", "dog", "on", "red")


def write_vae(folder: Path, channels: int = 4) -> Path:
    """An AutoencoderKL that makes 4 x 4 latents of 8 x 8 images."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    )  # fmt: skip
    vae.save_pretrained(str(folder))
    return folder


def write_t5(folder: Path) -> Path:
    """A T5 encoder of width 16 with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(str(folder))
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: index + 3 for index, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(str(folder))
    return folder


def picture(number: int, height: int = 20, width: int = 30) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_image_folder(root: Path, per_class: int = 2) -> Path:
    """Classes bird and cat; PNG, so that pixels are exact."""
    for label, name in enumerate(("bird", "cat")):
        (root / "train" / name).mkdir(parents=True)
        for number in range(per_class):
            picture(10 * label + number).save(root / "train" / name / f"{number}.png")
    return root


def write_sa1b(root: Path, count: int = 4, sizes: tuple[tuple[int, int], ...] = ((20, 30),)) -> Path:
    for name in ("images", "captions", "partition"):
        (root / name).mkdir(parents=True)
    for number in range(count):
        picture(number, *sizes[number % len(sizes)]).save(root / "images" / f"sa_{number}.jpg")
        (root / "captions" / f"sa_{number}.txt").write_text(f"a {WORDS[3 + number % 3]}\n")
    stems = [f"sa_{number}" for number in range(count)]
    (root / "partition" / "part0.txt").write_text("\n".join(stems[: count // 2]) + "\n")
    (root / "partition" / "part1.txt").write_text("\n".join(stems[count // 2 :]))
    return root


def write_coco(root: Path) -> Path:
    (root / "annotations").mkdir(parents=True)
    (root / "val2014").mkdir()
    images = [{"id": number, "file_name": f"COCO_{number}.png"} for number in (7, 3)]
    for entry in images:
        picture(entry["id"]).save(root / "val2014" / entry["file_name"])
    captions = [(12, 7, "second"), (11, 7, " a dog "), (20, 3, "a cat"), (21, 9, "of no image")]
    content = {
        "images": images,
        "annotations": [{"id": i, "image_id": image, "caption": text} for i, image, text in captions],
    }
    (root / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    return root


def write_mjhq(root: Path) -> Path:
    entries = {"aa": {"category": "people", "prompt": "a dog"}, "bb": {"category": "animals", "prompt": "a cat"}}
    for number, (stem, entry) in enumerate(entries.items()):
        (root / entry["category"]).mkdir(parents=True)
        picture(number).save(root / entry["category"] / f"{stem}.jpg")
    (root / "meta_data.json").write_text(json.dumps(entries))
    return root


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
