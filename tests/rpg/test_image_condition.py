"""Example images and sentences become conditions, of new examples and of a folder of task checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cli import run
from common.errors import CheckpointError, ConfigError, DataError
from rpg.condition_extraction import ExtractConfig, extract_conditions
from rpg.data import build_conditions
from rpg.extract_conditions import main
from rpg.generation_config import GenerateConfig, SamplingOverrides
from rpg.generation_run import generate_networks
from rpg.image_condition import DIGIT_FEATURES, build_image_encoder, image_condition, list_images, read_image
from rpg.saving import save_generator
from rpg.text_condition import TextEncoder, text_condition
from rpg.zoo.digits import load_images
from tests.rpg.tiny_generator import tiny_facts, tiny_generator


def digit_pictures(folder: Path, label: int, count: int = 3) -> Path:
    """The first test digits of a class as .png files."""
    from PIL import Image

    folder.mkdir(parents=True)
    images = load_images()
    chosen = images.test_N1HW[images.test_label_N == label][:count, 0]
    for number, pixels in enumerate(((chosen * 0.38 + 0.3) * 255).round().clamp(0, 255).byte().numpy()):
        Image.fromarray(np.asarray(pixels)).save(folder / f"{number}.png")
    return folder


def test_features_of_one_class_are_near_each_other():
    """Means of five unseen images: the nearest mean of five others is of the same class for at least nine digits."""
    images, encoder = load_images(), build_image_encoder("digits")
    means = torch.stack(
        [
            torch.stack(
                [
                    image_condition(encoder, list(images.test_N1HW[images.test_label_N == label][part]))
                    for label in range(10)
                ]
            )
            for part in (slice(0, 5), slice(5, 10))
        ]
    )
    assert means.shape == (2, 10, DIGIT_FEATURES)
    nearest = torch.cdist(means[0], means[1]).argmin(dim=1)
    assert int((nearest == torch.arange(10)).sum()) >= 9


def test_making_the_encoder_leaves_the_global_generator_alone():
    from rpg.image_condition import _train_digit_network

    first = build_image_encoder("digits")
    _train_digit_network.cache_clear()
    state = torch.get_rng_state()
    again = build_image_encoder("digits")
    assert torch.equal(torch.get_rng_state(), state)
    image = load_images().test_N1HW[0]
    assert torch.equal(first([image]), again([image]))


def test_pictures_are_read_and_the_rest_is_named(tmp_path: Path):
    folder = digit_pictures(tmp_path / "five", 5)
    encoder = build_image_encoder("digits")
    from_files = image_condition(encoder, [read_image(path) for path in list_images(folder)])
    images = load_images()
    from_tensors = image_condition(encoder, list(images.test_N1HW[images.test_label_N == 5][:3]))
    assert torch.allclose(from_files, from_tensors, atol=0.05)
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(DataError, match=r"broken\.png"):
        read_image(tmp_path / "broken.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        list_images(tmp_path / "empty")
    with pytest.raises(DataError, match="at least one"):
        image_condition(encoder, [])


def test_networks_of_timm_and_transformers_encode_pictures(tmp_path: Path):
    import timm
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    picture = read_image(digit_pictures(tmp_path / "three", 3, 1) / "0.png")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = timm.create_model("test_resnet", num_classes=0)
        proportions = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        ViTModel(ViTConfig(image_size=16, patch_size=8, **proportions)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(small.state_dict(), folder / "model.safetensors")
    described = {
        "architecture": "test_resnet",
        "num_classes": 0,
        "pretrained_cfg": {"input_size": [3, 64, 64], "num_classes": 0},
    }
    (folder / "config.json").write_text(json.dumps(described))
    by_timm = image_condition(build_image_encoder(f"timm:{folder}"), [picture])
    assert by_timm.shape == (small.num_features,)
    by_transformers = image_condition(build_image_encoder(str(tmp_path / "vit")), [picture, picture])
    assert by_transformers.shape == (16,)
    assert float(by_transformers.square().mean()) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(CheckpointError, match="encoder="):
        build_image_encoder(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="encoder is empty"):
        build_image_encoder("")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for task in (1, 512, 513):
        torch.save({"w": torch.zeros(2)}, folder / f"0001_acc0.9000_class{task:04d}_x.pth")
    return folder


def test_conditions_of_checkpoints_are_means_over_their_positive_classes(checkpoints, tmp_path):
    output = tmp_path / "conditions.json"
    config = ExtractConfig(checkpoints=str(checkpoints), output=str(output), examples=8)
    table = extract_conditions(config)
    names = sorted(table)
    condition_KC = build_conditions(names, "file", str(output))
    assert condition_KC.shape == (3, DIGIT_FEATURES)
    only_nine, only_zero, both = condition_KC
    assert torch.dist(both, (only_nine + only_zero) / 2) < 0.6 * torch.dist(only_nine, only_zero)
    with pytest.raises(DataError, match="overwrite=true"):
        extract_conditions(config)
    torch.save({"w": torch.zeros(2)}, checkpoints / "other.pth")
    with pytest.raises(DataError, match=r"other\.pth does not say its task"):
        extract_conditions(ExtractConfig(checkpoints=str(checkpoints), output=str(tmp_path / "b.json")))
    with pytest.raises(DataError, match="0 sub-folders; it needs 10"):
        extract_conditions(
            ExtractConfig(
                checkpoints=str(checkpoints), output=str(tmp_path / "c.json"), images=str(tmp_path / "none"),
                pattern="*class*",
            )
        )  # fmt: skip


def test_new_examples_make_a_network(tmp_path):
    model, codec = tiny_generator(condition="full", condition_size=DIGIT_FEATURES, d_condition=16)
    folder = save_generator(tmp_path / "generator", model, codec, tiny_facts(condition_kind="file"))
    places = [digit_pictures(tmp_path / name, label) for name, label in (("ones", 1), ("twos", 2))]
    config = GenerateConfig(
        generator=str(folder), images=[str(place) for place in places], encoder="digits", output=str(tmp_path / "made"),
        sampling=SamplingOverrides(steps=3), progress=False,
    )  # fmt: skip
    records = generate_networks(config).records
    assert [record["file"] for record in records] == ["generated_tiny_ones_001.pth", "generated_tiny_twos_001.pth"]
    assert records[0]["condition"] != records[1]["condition"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random LLaMA of width 16 over letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    letters = ["<unk>", *"abcdefghijklmnopqrstuvwxyz ,"]
    tokenizer = Tokenizer(models.WordLevel({letter: place for place, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    folder = tmp_path_factory.mktemp("language")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    proportions = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaModel(LlamaConfig(vocab_size=len(letters), **proportions)).save_pretrained(folder)
    return str(folder)


def test_sentences_become_conditions(language_model, checkpoints, tmp_path):
    encoder = TextEncoder(language_model)
    cats, dogs = (text_condition(encoder, text) for text in ("all cats", "all dogs"))
    assert cats.shape == (16,)
    assert not torch.allclose(cats, dogs)
    assert torch.equal(cats, text_condition(TextEncoder(language_model), "all cats"))
    with pytest.raises(DataError, match="no tokens"):
        text_condition(encoder, "")
    table = extract_conditions(
        ExtractConfig(
            checkpoints=str(checkpoints), output=str(tmp_path / "texts.json"), kind="text", encoder=language_model,
            template="all {classes}",
        )
    )  # fmt: skip
    expected = text_condition(encoder, "all airplane, truck").tolist()
    assert table["0001_acc0.9000_class0513_x.pth"] == pytest.approx(expected)
    with pytest.raises(CheckpointError, match="encoder="):
        TextEncoder(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="language model"):
        ExtractConfig(checkpoints="a", output="b", kind="text")


def test_the_command_line(checkpoints, tmp_path, monkeypatch, capsys):
    arguments = [f"checkpoints={checkpoints}", f"output={tmp_path}/out.json", "examples=1"]
    monkeypatch.setattr("sys.argv", ["extract_conditions", *arguments])
    assert run(main, "extract_conditions", ExtractConfig, "configs/rpg", print_config=False) == 0
    assert f"3 conditions of {DIGIT_FEATURES} numbers" in capsys.readouterr().out
