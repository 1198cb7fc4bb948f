"""Small convolutional networks on the handwritten digits embedded in scikit-learn: checkpoints in four seconds.

1797 images of 8 x 8 pixels; 797 train and 1000 test, since the similarity of two networks is judged by the test images
they get wrong, of which there must be enough. One training gives many checkpoints at consecutive steps of a constant
final rate (``digits_cnn``), several seeds give several independent groups of them (``digits_permutation``).

Letters: N images, C classes, B batch, H and W pixels.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.data.images import embedded_digits
from common.errors import ConfigError, DataError
from common.seeding import generator
from rpg.tasks import CheckpointName
from rpg.testing import PythonTester, State

TRAIN_IMAGES = 797
MEAN, DEVIATION = 0.3, 0.38  # of the pixels, after division by 16
NUM_CLASSES = 10
SPLITS = ("train", "test")


@dataclass(frozen=True)
class DigitImages:
    """Standardised images (N, 1, 8, 8) and their digits, in a fixed random order."""

    train_N1HW: Tensor
    train_label_N: Tensor
    test_N1HW: Tensor
    test_label_N: Tensor


@functools.cache
def load_images() -> DigitImages:
    """The embedded digits: 797 to train on and 1000 to test with; the split is the same for every seed."""
    pixels_NHW, label_N = embedded_digits()
    # one fixed split: torch's own generator at 0, so that others can draw the same one
    order_N = torch.randperm(len(label_N), generator=torch.Generator().manual_seed(0))
    images_N1HW = ((pixels_NHW - MEAN) / DEVIATION)[order_N, None]
    label_N = label_N[order_N]
    return DigitImages(
        images_N1HW[:TRAIN_IMAGES], label_N[:TRAIN_IMAGES], images_N1HW[TRAIN_IMAGES:], label_N[TRAIN_IMAGES:]
    )


class DigitCNN(nn.Module):
    """Two convolutions with batch normalisation and two linear layers: 3,682 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES))

    def forward(self, images_B1HW: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.head(self.features(images_B1HW).flatten(1))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> "DigitCNN":
        """Draws PyTorch's default initial weights from ``generator``; returns itself."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = 1 / math.sqrt(module.weight[0].numel())
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-bound, bound, generator=generator)
        return self


@dataclass(frozen=True, kw_only=True)
class DigitRecipe:
    """How one network is trained and which of its states are kept."""

    epochs: int = 30
    batch_size: int = 32
    lr: float = 3e-3
    save_lr: float = 1e-3  # the rate that the cosine ends at and that checkpoints are saved along
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    num_checkpoints: int = 150  # states kept, one per step, after the last epoch

    def __post_init__(self) -> None:
        if not 2 <= self.batch_size <= TRAIN_IMAGES:
            raise ConfigError(
                f"batch_size={self.batch_size} does not fit the {TRAIN_IMAGES} training digits (batch normalisation "
                f"needs 2 or more); choose 2 to {TRAIN_IMAGES}."
            )
        if self.epochs < 0 or self.num_checkpoints < 1:
            raise ConfigError(
                f"epochs={self.epochs}, num_checkpoints={self.num_checkpoints}: epochs must be 0 or more and at least "
                "one checkpoint must be kept."
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: a cosine from ``lr`` to ``save_lr``, constant after the last epoch."""
        decay_steps = self.epochs * (TRAIN_IMAGES // self.batch_size)
        progress = min(1.0, step / decay_steps) if decay_steps else 1.0
        return self.save_lr + (self.lr - self.save_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def shifted(images_B1HW: Tensor, down: int, right: int) -> Tensor:
    """Images moved by at most one pixel; what comes in is background."""
    height, width = images_B1HW.shape[-2:]
    padded = functional.pad(images_B1HW, (1, 1, 1, 1), value=-MEAN / DEVIATION)
    return padded[..., 1 - down : 1 - down + height, 1 - right : 1 - right + width]


def batches(recipe: DigitRecipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training batches (images, digits); every second one is moved by a random pixel."""
    images, step, epoch = load_images(), 0, 0
    while True:
        order_N = torch.randperm(TRAIN_IMAGES, generator=generator(seed, "order", epoch))
        for index_B in order_N.split(recipe.batch_size):
            if len(index_B) < recipe.batch_size:  # the rest of an epoch
                continue
            images_B1HW = images.train_N1HW[index_B]
            if step % 2 == 0:
                down, right = torch.randint(-1, 2, (2,), generator=generator(seed, "shift", step)).tolist()
                images_B1HW = shifted(images_B1HW, down, right)
            yield images_B1HW, images.train_label_N[index_B]
            step += 1
        epoch += 1


def train_network(seed: int, recipe: DigitRecipe | None = None) -> Iterator[dict[str, Tensor]]:
    """Trains one network and yields copies of its state after each of the last ``num_checkpoints`` steps.

    Args:
        seed: of the initial weights, the order of the images and the shifts; nothing else is random.
    """
    recipe = recipe or DigitRecipe()
    network = DigitCNN().initialise(generator(seed, "weights")).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    training_steps = recipe.epochs * (TRAIN_IMAGES // recipe.batch_size)
    for step, (images_B1HW, label_B) in enumerate(batches(recipe, seed)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        optimizer.zero_grad()
        functional.cross_entropy(network(images_B1HW), label_B, label_smoothing=recipe.label_smoothing).backward()
        optimizer.step()
        if step >= training_steps:
            yield {name: value.detach().clone() for name, value in network.state_dict().items()}
        if step == training_steps + recipe.num_checkpoints - 1:
            return


def require_split(split: str) -> str:
    """``split``, if it is one.

    Raises: ConfigError for another.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is no part of the digits; choose test or train.")
    return split


class DigitTester(PythonTester):
    """Tests states of ``DigitCNN`` on the 1000 test digits, or on those trained on.

    Args:
        split: ``test`` or ``train``.
    """

    def __init__(self, split: str = "test") -> None:
        images = load_images()
        self.images_N1HW = images.test_N1HW if require_split(split) == "test" else images.train_N1HW
        self.classes_N = images.test_label_N if split == "test" else images.train_label_N
        self.network = DigitCNN().eval()

    @torch.no_grad()
    def logits(self, state: State, *, task: int | None = None) -> tuple[Tensor, Tensor]:
        """Logits (N, 10) of a network and the digits (N,).

        Raises: DataError for a state of another network.
        """
        try:
            self.network.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise DataError(f"this is no state of DigitCNN: {error}") from error
        return self.network(self.images_N1HW), self.classes_N


def named_networks(
    seed: int, recipe: DigitRecipe | None = None, *, tag: str = "digits_cnn", by_seed: bool = False
) -> Iterator[tuple[CheckpointName, dict[str, Tensor]]]:
    """Trained networks with the names they are stored under, which hold the accuracy on the test digits.

    Args:
        by_seed: the names say the seed too, so that checkpoints of several trainings can share a folder.
    """
    tester = DigitTester()
    for number, state in enumerate(train_network(seed, recipe), start=1):
        predicted_N, target_N = tester.predict(state)
        accuracy = float((predicted_N == target_N).double().mean())
        yield CheckpointName(number, accuracy, tag, *(("seed", seed) if by_seed else ())), state
