"""Texts of a snapshot depend on the seed, the step and their number, not on how many processes drew them."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from common.data.tokenizer import ByteTokenizer
from radd.config import SamplingConfig, TrainConfig
from radd.model import RADD, ModelConfig
from radd.snapshots import Snapshots, export, model_card


def snapshots(predictor: str = "euler") -> Snapshots:
    config = TrainConfig(
        tokens=128,
        model=ModelConfig(hidden_size=16, n_blocks=1, n_heads=2, length=12),
        sampling=SamplingConfig(predictor=predictor, steps=5),
    )
    return Snapshots(config, ByteTokenizer())


@pytest.fixture(scope="module")
def model() -> RADD:
    torch.manual_seed(0)
    model = RADD(snapshots().config.model, 128).eval()
    torch.nn.init.normal_(model.output_layer.linear.weight)
    return model


@pytest.mark.parametrize("predictor", ["euler", "tweedie", "ordered", "first_hitting"])
def test_a_text_is_the_same_whoever_draws_it(model: RADD, predictor: str):
    hook = snapshots(predictor)
    together = hook.sample(model, range(4), seed=7).tokens_BL
    second_process = hook.sample(model, range(2, 4), seed=7).tokens_BL
    assert together[2:].equal(second_process)
    assert not together[:2].equal(together[2:])
    assert not hook.sample(model, range(4), seed=8).tokens_BL.equal(together)
    assert int(together.max()) < 128  # no mask is left


def test_calls_follow_the_predictor(model: RADD):
    assert int(snapshots("euler").sample(model, range(3), seed=0).calls_B.max()) <= 5
    assert snapshots("ordered").sample(model, range(3), seed=0).calls_B.tolist() == [12, 12, 12]


def test_an_export_says_where_it_comes_from(tmp_path: Path, model: RADD):
    config = snapshots().config
    folder = export(tmp_path / "export", model.state_dict(), config, ByteTokenizer())
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(asdict(config)))
    card = (folder / "README.md").read_text()
    assert card == model_card(config)
    for fact in ("loss t_DCE", "width\n16", "Seed 0", "torch "):
        assert fact in card
