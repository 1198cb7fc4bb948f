"""Targets take over what the data decide, and nothing else."""

from dataclasses import dataclass

import pytest

from common.errors import ConfigError, DataError
from logah.architectures import Architecture, gpt2, resolve_target, vit
from logah.matching import match_data


@dataclass
class Images:
    num_classes: int = 7
    kind: str = "vision"
    vocab_size: int | None = None
    block_size: int | None = None


@dataclass
class Text:
    vocab_size: int = 300
    block_size: int = 16
    kind: str = "lm"
    num_classes: int | None = None


def test_classifiers_get_the_classes_of_the_data():
    for target in (vit(2, 1, 2, 8, image_size=8), resolve_target("resnet18"), resolve_target("timm:resnet18")):
        matched = match_data(target, Images())
        assert matched.num_classes == 7 and matched.family == target.family
        assert matched.image_size == target.image_size
        with pytest.raises(ConfigError, match="7; use match_data=true"):
            match_data(target, Images(), enabled=False)
    same = vit(2, 1, 2, 8, num_classes=7)
    assert match_data(same, Images(), enabled=False) is same


def test_language_models_get_a_larger_vocabulary_only():
    matched = match_data(gpt2(8, 1, 2, vocab_size=100, n_positions=16), Text())
    assert matched.vocab_size == 300 and matched.build_meta().lm_head.weight.shape == (300, 8)
    assert match_data(gpt2(8, 1, 2), Text()).vocab_size == 50257
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 100}
    assert match_data(Architecture("hf", {"config": config}), Text()).vocab_size == 300


def test_text_and_images_are_not_mixed_up_and_blocks_must_fit():
    with pytest.raises(ConfigError, match="language model, data.kind=vision"):
        match_data(gpt2(8, 1, 2), Images())
    with pytest.raises(ConfigError, match="classifier of images, data.kind=lm"):
        match_data(vit(2, 1, 2, 8), Text())
    with pytest.raises(DataError, match="data.block_size=16 exceeds the context of 8"):
        match_data(gpt2(8, 1, 2, n_positions=8), Text())
