"""The convolutional networks on embedded digits: split, training, names, tester."""

import pytest
import torch

from common.errors import ConfigError, DataError
from rpg.tasks import parse_name
from rpg.zoo.digits import DigitCNN, DigitRecipe, DigitTester, load_images, named_networks, shifted, train_network

SHORT = DigitRecipe(epochs=4, num_checkpoints=3)


@pytest.fixture(scope="module")
def collected():
    return list(named_networks(3, SHORT, by_seed=True))


def test_split_holds_every_digit_image_once():
    images = load_images()
    assert images.train_N1HW.shape == (797, 1, 8, 8) and images.test_N1HW.shape == (1000, 1, 8, 8)
    everything = torch.cat([images.train_N1HW, images.test_N1HW]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything)
    assert torch.cat([images.train_label_N, images.test_label_N]).bincount().min() > 170
    assert float(everything.mean()) == pytest.approx(0, abs=0.02)
    assert float(everything.std()) == pytest.approx(1, abs=0.02)


def test_network_has_the_stated_sizes():
    network = DigitCNN()
    assert sum(parameter.numel() for parameter in network.parameters()) == 3682
    assert sum(v.numel() for v in network.state_dict().values() if v.is_floating_point()) == 3730


def test_a_few_epochs_reach_nine_tenths_and_checkpoints_are_neighbours(collected):
    assert len(collected) == 3
    for name, state in collected:
        assert name.accuracy > 0.85
        assert DigitCNN().load_state_dict(state, strict=True)
    steps = [int(state["features.1.num_batches_tracked"]) for _, state in collected]
    assert steps == [4 * 24 + 1, 4 * 24 + 2, 4 * 24 + 3]


def test_names_hold_number_accuracy_and_seed(collected):
    tester = DigitTester()
    for number, (name, state) in enumerate(collected, start=1):
        predicted_N, target_N = tester.predict(state)
        found = parse_name(name.file_name())
        assert (found.index, found.seed, found.tag) == (number, 3, "digits_cnn")
        assert found.accuracy == pytest.approx(float((predicted_N == target_N).float().mean()), abs=5e-5)


def test_a_training_depends_on_its_seed_only(collected):
    torch.manual_seed(99)
    again = next(train_network(3, SHORT))
    assert all(torch.equal(value, collected[0][1][key]) for key, value in again.items())
    other = next(train_network(4, SHORT))
    assert not torch.equal(other["head.0.weight"], again["head.0.weight"])


def test_learning_rate_is_a_cosine_that_ends_where_checkpoints_are_saved():
    recipe = DigitRecipe()
    assert recipe.lr_at(0) == pytest.approx(3e-3)
    assert recipe.lr_at(15 * 24) == pytest.approx(2e-3)
    assert recipe.lr_at(30 * 24) == recipe.lr_at(30 * 24 + 149) == pytest.approx(1e-3)


def test_shift_moves_by_one_pixel_and_fills_with_background():
    images_B1HW = load_images().train_N1HW[:2]
    moved = shifted(images_B1HW, 1, -1)
    assert torch.equal(moved[:, :, 1:, :-1], images_B1HW[:, :, :-1, 1:])
    assert (moved[:, :, 0] == images_B1HW.min()).all()
    assert torch.equal(shifted(images_B1HW, 0, 0), images_B1HW)


def test_mistakes_name_option_value_and_remedy(collected):
    with pytest.raises(ConfigError, match="split='valid'.*choose"):
        DigitTester("valid")
    with pytest.raises(ConfigError, match="batch_size=1"):
        DigitRecipe(batch_size=1)
    with pytest.raises(ConfigError, match="num_checkpoints=0"):
        DigitRecipe(num_checkpoints=0)
    state = dict(collected[0][1])
    state["head.0.weight"] = state["head.0.weight"][:5]
    with pytest.raises(DataError, match="head.0.weight"):
        DigitTester().predict(state)
