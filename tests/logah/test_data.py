"""Data: what a step sees is a function of (seed, step), test data are never augmented or trained on."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from common.conversion import from_config
from common.data.loader import build_validation_loader
from common.errors import ConfigError, DataError
from common.seeding import derive_seed
from logah.data import DataSection, build_data, build_train_loader
from logah.image_data import FileImages, TensorImages, first_of_each_class, split_digits

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "logah" / "data"
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


def digits(**options):
    return build_data(DataSection(name="digits", batch_size=50, **options), seed=1)


def text(**options):
    options = {"name": "embedded:topics", "tokenizer": "byte", "block_size": 32, "cache_dir": None, **options}
    return build_data(DataSection(kind="lm", batch_size=4, **options), seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``train`` and ``val`` with three classes of one colour each: 10 and 4 images."""
    root, draws = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for label, colour in enumerate(COLOURS):
            place = root / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + draws.normal(0, 60, (30, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return root


def photographs(root, **options):
    return build_data(DataSection(name="folder", root=str(root), size=24, batch_size=8, **options), seed=1)


# ----------------------------------------------------------------------------------------------------------- digits


def test_digits_are_standardised_and_their_held_out_part_is_stratified():
    data = digits()
    assert (data.num_train, len(data.test), data.num_classes, data.image_size) == (1437, 360, 10, 8)
    assert data.steps_per_epoch == 29
    images = data.train.rows.fetch(range(1437))["images"]
    assert images.shape == (1437, 3, 8, 8) and images.dtype == torch.float32
    assert abs(float(images.mean())) < 1e-5 and abs(float(images.std()) - 1) < 1e-5
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert data.test.label_N.bincount(minlength=10).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    train_N88, _, test_N88, _ = split_digits()
    assert not {row.numpy().tobytes() for row in test_N88} & {row.numpy().tobytes() for row in train_N88}


def test_a_batch_is_a_function_of_seed_and_step():
    data, other = digits(augmentation="crop", noise=0.1), digits(augmentation="crop", noise=0.1)
    later = other.training_batch(40)
    torch.manual_seed(0)
    for step in (0, 3, 40):
        batch = data.training_batch(step)
        again = later if step == 40 else other.training_batch(step)
        assert torch.equal(batch["images"], again["images"]) and torch.equal(batch["labels"], again["labels"])
    reordered = data.with_seed(2).training_batch(3)
    assert not torch.equal(data.training_batch(3)["labels"], reordered["labels"])


def test_every_image_is_seen_once_per_epoch_and_none_is_dropped():
    data = build_data(DataSection(name="digits", batch_size=100, limit_train=250))
    seen = torch.cat([data.training_batch(step)["images"] for step in range(5)])  # two epochs of 250
    known = {image.numpy().tobytes() for image in data.train.rows.fetch(range(250))["images"]}
    for epoch in (seen[:250], seen[250:]):
        assert {image.numpy().tobytes() for image in epoch} == known
    assert not torch.equal(seen[:250], seen[250:])


def test_a_batch_larger_than_the_data_spans_epochs():
    data = build_data(DataSection(name="digits", batch_size=25, limit_train=10))
    assert data.steps_per_epoch == 1
    labels = data.training_batch(0)["labels"]
    assert len(labels) == 25 and torch.equal(labels[:10].sort().values, labels[10:20].sort().values)


def test_crops_differ_by_epoch_and_never_touch_tests():
    data = digits(augmentation="crop", limit_train=50)
    first, second = data.training_batch(0)["images"], data.training_batch(1)["images"]
    order = [first.flatten(1).sum(1).sort().values, second.flatten(1).sum(1).sort().values]
    assert not torch.equal(*order)  # the same 50 images, moved differently
    plain = next(digits().test_batches())["images"]
    assert torch.equal(next(data.test_batches())["images"], plain)


def test_other_sizes_are_interpolated():
    assert digits(size=16).training_batch(0)["images"].shape == (50, 3, 16, 16)


def test_digits_move_over_a_black_ground():
    data = digits(augmentation="crop", crop_padding=7)
    corner = float(data.train.rows.images.pixels_NCSS.min())
    moved = data.training_batch(0)["images"]
    assert float(moved.min()) == corner and (moved == corner).float().mean() > 0.6


def test_noise_has_the_deviation_asked_for_and_is_the_same_at_every_test():
    noisy, plain = digits(noise=0.5), digits()
    difference = next(noisy.test_batches())["images"] - next(plain.test_batches())["images"]
    assert abs(float(difference.std()) - 0.5) < 0.01
    assert torch.equal(next(noisy.test_batches())["images"], next(noisy.test_batches())["images"])
    change = noisy.training_batch(0)["images"] - plain.training_batch(0)["images"]
    assert abs(float(change.std()) - 0.5) < 0.02


def test_validation_holds_out_the_last_training_images():
    data, whole = digits(held_out=0.1), digits()
    assert (data.num_train, len(data.validation)) == (1294, 143)
    expected = whole.train.rows.fetch(range(1294, 1437))
    assert torch.equal(data.validation.fetch(range(143))["images"], expected["images"])
    assert torch.equal(torch.cat([b["labels"] for b in whole.validation_batches()]), whole.test.label_N)


def test_few_shot_takes_the_first_of_each_class():
    assert first_of_each_class(torch.tensor([2, 0, 2, 2, 0, 1]), 2).tolist() == [0, 1, 2, 4, 5]
    data = digits(few_shot=3, held_out=0.5)
    assert data.train.rows.label_N.bincount().tolist() == [3] * 10


# ---------------------------------------------------------------------------------------------------------- folders


def test_folders_are_cropped_for_training_and_not_for_tests(folder):
    data = photographs(folder)
    assert (data.num_train, len(data.test), data.class_names) == (30, 12, ("class0", "class1", "class2"))
    rows = data.train.rows
    assert torch.equal(rows.fetch([4], [9])["images"], rows.fetch([4], [9])["images"])
    assert not torch.equal(rows.fetch([4], [9])["images"], rows.fetch([4], [10])["images"])
    assert torch.equal(data.test.fetch([5])["images"], data.test.fetch([5])["images"])
    assert data.test.fetch([5])["images"].shape == (1, 3, 24, 24)


@pytest.mark.parametrize("description", ["rand-m7-mstd0.5", "original", "augmix-m5"])
def test_timm_augmentations_are_drawn_from_the_seed(folder, description):
    rows = photographs(folder, auto_augment=description).train.rows
    seeds = list(range(6))
    first, again = rows.fetch(seeds, seeds)["images"], rows.fetch(seeds, seeds)["images"]
    assert torch.equal(first, again)
    assert not torch.equal(first, photographs(folder).train.rows.fetch(seeds, seeds)["images"])


def test_parts_of_folders_cover_their_classes(folder):
    data = photographs(folder, held_out=0.2, limit_test=6)
    assert data.train.rows.label_N.bincount().tolist() == [8, 8, 8]
    assert data.validation.label_N.bincount().tolist() == [2, 2, 2]
    assert data.test.label_N.bincount().tolist() == [2, 2, 2]
    assert photographs(folder, limit_train=9).train.rows.label_N.bincount().tolist() == [3, 3, 3]


def test_workers_read_the_same_batches(folder):
    alone, helped = photographs(folder), photographs(folder, num_workers=1)
    helped_batches = helped.training_batches(2)
    for step, batch in zip((2, 3), helped_batches):
        assert torch.equal(batch["images"], alone.training_batch(step)["images"])
    copy = pickle.loads(pickle.dumps(alone))
    assert torch.equal(copy.training_batch(5)["images"], alone.training_batch(5)["images"])


def test_folders_that_do_not_fit_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="CLASS/FILE.jpg"):
        photographs(tmp_path)
    with pytest.raises(DataError, match=r"data.download=true"):
        build_data(DataSection(name="cifar100", root=str(tmp_path)))
    with pytest.raises(ConfigError, match="rand-m7"):
        photographs(folder, auto_augment="rand-nonsense7")
    with pytest.raises(DataError, match="held_out=0.01"):
        photographs(folder, held_out=0.01)
    for split, label in (("train", "a"), ("val", "b")):
        (tmp_path / split / label).mkdir(parents=True)
        Image.new("RGB", (30, 30)).save(tmp_path / split / label / "0.png")
    with pytest.raises(DataError, match="different classes"):
        photographs(tmp_path)


# ------------------------------------------------------------------------------------------------------------ CIFAR


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with CIFAR-10's files: 10 training and 2 test images."""
    place, draws = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    place.mkdir()
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        batch = {"data": draws.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [3, 7]}
        (place / name).write_bytes(pickle.dumps(batch))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{n}" for n in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # the files' published hashes
    return tmp_path


def test_cifar_in_memory_equals_cifar_image_by_image(cifar):
    options = {"name": "cifar10", "root": str(cifar), "batch_size": 5}
    quick, slow = build_data(DataSection(**options)), build_data(DataSection(**options, colour_jitter=(0, 0, 0, 0)))
    assert isinstance(quick.train.rows.images, TensorImages) and isinstance(slow.train.rows.images, FileImages)
    assert torch.equal(next(quick.test_batches())["images"], next(slow.test_batches())["images"])
    rows = list(range(10))
    assert torch.equal(quick.train.rows.fetch(rows)["images"], slow.train.rows.fetch(rows)["images"])
    assert quick.train.rows.fetch(rows)["images"].shape == (10, 3, 32, 32) and quick.num_classes == 10


def test_random_crops_and_flips_of_a_batch_are_those_of_each_image():
    pixels = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).reshape(2, 3, 6, 6)
    unit = ((0.0,) * 3, (1.0,) * 3)
    images = TensorImages(pixels, torch.tensor([0, 1]), ["a", "b"], statistics=unit, padding=2, flip=True)
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2)).float() / 255
    places, flips = set(), 0
    for seed in (derive_seed(0, "augmentation", n) for n in range(300)):
        found = images.batch(torch.tensor([1, 0]), [seed, seed + 1])[0]
        windows = {
            (down, right, flip): padded[1, :, down : down + 6, right : right + 6]
            for down in range(5)
            for right in range(5)
            for flip in (False, True)
        }
        (match,) = [key for key, window in windows.items() if torch.equal(window.flip(2) if key[2] else window, found)]
        places.add(match[:2])
        flips += match[2]
    assert len(places) == 25 and 120 < flips < 180


# ------------------------------------------------------------------------------------------------------------- text


def test_text_is_cut_into_blocks_and_its_test_part_is_apart():
    data = text(tokenizer="bpe:512", block_size=64)
    assert data.kind == "lm" and data.vocab_size == 512 and data.block_size == 64
    batch = data.training_batch(0)["tokens"]
    assert batch.shape == (4, 64) and batch.dtype == torch.int64 and int(batch.max()) < 512
    assert 200_000 < 64 * (data.num_train + len(data.test)) < 230_000
    trained_on = {row.numpy().tobytes() for row in data.train.rows.fetch(range(data.num_train))["tokens"]}
    tested_on = {row.numpy().tobytes() for batch in data.test_batches() for row in batch["tokens"]}
    assert not trained_on & tested_on
    assert len(list(data.validation_batches())) == len(list(data.test_batches()))


def test_documents_of_files_are_joined_with_or_without_an_end(tmp_path):
    for split, lines in (("train", "one\ntwo\n" * 40), ("valid", "three\n" * 20), ("test", "four\n" * 20)):
        (tmp_path / f"{split}.txt").write_text(lines)
    options = {"name": str(tmp_path), "text_unit": "full_line", "block_size": 8}
    ended, bare = text(**options), text(**options, end_of_text=False)
    assert 0 in ended.train.rows.fetch(range(4))["tokens"]
    tokens = bare.train.rows.fetch(range(bare.num_train))["tokens"].flatten().tolist()
    assert bare.tokenizer.decode(tokens).startswith("one\ntwo\none\n") and 0 not in tokens
    assert bare.tokenizer.decode(bare.validation.fetch([0])["tokens"][0]) == "three\nth"
    assert bare.tokenizer.decode(bare.test.fetch([0])["tokens"][0]) == "four\nfou"


def test_groups_of_documents_lose_their_remainders(tmp_path):
    (tmp_path / "train.txt").write_text("abcdefg\n" * 10)
    (tmp_path / "test.txt").write_text("ABCDEFG\n" * 10)
    options = {"name": str(tmp_path), "text_unit": "full_line", "end_of_text": False, "block_size": 12}
    options |= {"valid": str(tmp_path / "test.txt")}
    assert len(text(**options).train) == 6  # 80 characters
    assert len(text(**options, group_size=2).train) == 5  # 16 characters each, of which 4 are lost


def test_a_held_out_share_is_the_one_that_datasets_takes(tmp_path):
    import datasets

    documents = [f"document number {n}. " + "x" * 20 for n in range(200)]
    rows = datasets.Dataset.from_dict({"text": documents})
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "all.txt").write_text("\n".join(documents) + "\n")
    expected = rows.train_test_split(test_size=0.05, seed=2357)["test"]["text"]
    for place, unit in (("saved", None), ("lines", "line")):
        data = text(name=str(tmp_path / place), text_unit=unit, held_out=0.05, block_size=16)
        tokens = torch.cat([batch["tokens"] for batch in data.test_batches()]).flatten().tolist()
        found = data.tokenizer.decode(tokens)
        assert found.count("number") == len(expected) == 10
        assert all(document[:20] in found for document in expected[:9])
        train = data.tokenizer.decode(
            torch.cat([data.train.rows.fetch(range(data.num_train))["tokens"]]).flatten().tolist()
        )
        assert not any(document[:20] in train for document in expected)
    with pytest.raises(DataError, match="data.held_out=0.999"):
        text(name=str(tmp_path / "saved"), held_out=0.999, block_size=16)


def test_a_text_is_never_validated_on_itself(tmp_path):
    file = tmp_path / "all.txt"
    file.write_text("a line\n" * 50)
    with pytest.raises(DataError, match=r"data.valid=None.*data.held_out=0.05"):
        text(name=str(file), text_unit="line", block_size=8)
    (tmp_path / "other.txt").write_text("another\n" * 20)
    with pytest.raises(DataError, match=r"data.test=.*all.txt"):
        text(name=str(file), valid=str(tmp_path / "other.txt"), test=str(file), text_unit="line", block_size=8)
    data = text(name=str(file), valid=str(tmp_path / "other.txt"), text_unit="line", block_size=8)
    assert len(data.validation) == len(data.test) == 20
    assert len(text(name=str(file), valid="embedded:topics", text_unit="line", block_size=8).test) > 100


def test_limits_of_text():
    data = text(limit_train=5, limit_test=3)
    assert data.num_train == 5 and len(data.test) == len(data.validation) == 3
    assert sum(len(batch["tokens"]) for batch in data.test_batches()) == 3


# ---------------------------------------------------------------------------------------------------------- loaders


@pytest.mark.parametrize("make", [lambda: digits(augmentation="crop"), text])
def test_the_engines_loader_deals_out_the_same_batches(make):
    data, size = make(), 2 if make is text else 25
    name = "tokens" if make is text else "images"
    for workers in (0, 1):
        loaders = [
            iter(build_train_loader(data, micro_size=size, rank=rank, world_size=2, num_workers=workers))
            for rank in (0, 1)
        ]
        for step in range(2):
            whole = data.training_batch(step)[name]
            parts = [next(loader)[name] for loader in loaders]
            assert torch.equal(torch.cat(parts), whole)
    half = data.training_batch(1, rows=slice(1, 3))[name]
    assert torch.equal(half, data.training_batch(1)[name][1:3])


def test_a_resumed_loader_continues_where_it_was():
    data = digits(augmentation="crop")
    loader = build_train_loader(data, micro_size=25)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    resumed = build_train_loader(data, micro_size=25)
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(next(iter(resumed))["images"], next(batches)["images"])


def test_held_out_batches_are_dealt_out_once():
    data = digits(eval_batch_size=100)
    whole = torch.cat([batch["labels"] for batch in data.test_batches()])
    dealt = [len(batch["labels"]) for rank in (0, 1) for batch in data.test_batches(rank, 2)]
    assert len(whole) == 360 and sorted(dealt) == [60, 100, 100, 100]
    loader = build_validation_loader(data.test, batch_size=100)
    assert torch.equal(torch.cat([batch["labels"] for _, batch in loader.batches()]), whole)


# ---------------------------------------------------------------------------------------------------------- options


def test_every_data_file_names_every_option_of_its_kind():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert {"digits", "cifar10", "cifar100", "imagenet", "embedded", "wikitext2", "wikitext103", "openwebtext"} <= names
    known, kinds = set(DataSection.__dataclass_fields__), {"vision": set(), "lm": set()}
    for path in CONFIGS.glob("*.yaml"):
        options = OmegaConf.load(path)
        for missing in (name for name in options if OmegaConf.is_missing(options, name)):
            options[missing] = "somewhere.txt"
        section = from_config(DataSection, options, "data")
        kinds[section.kind] = kinds[section.kind] or set(options)
        assert set(options) == kinds[section.kind], path.name
    assert kinds["vision"] | kinds["lm"] == known


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "audio"}, "data.kind"),
        ({"name": "mnist"}, "data.name"),
        ({"kind": "lm", "name": "cifar10"}, "data.kind=vision"),
        ({"held_out": 1.0}, "data.held_out"),
        ({"kind": "lm", "name": "openwebtext", "held_out": 0.1, "valid": "wikitext103"}, "set data.held_out=0"),
        ({"augmentation": "randaugment"}, "data.augmentation"),
        ({"name": "cifar10", "augmentation": "none", "auto_augment": "original"}, "data.auto_augment"),
        ({"name": "folder", "colour_jitter": (0.4, 0.4)}, "data.colour_jitter"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"few_shot": 0}, "data.few_shot"),
    ],
)
def test_options_that_do_not_fit_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        DataSection(**options)
