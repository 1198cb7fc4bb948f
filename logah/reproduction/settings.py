"""What the small reproduction runs: hypernetworks of two kinds, unseen larger networks, and how those are trained.

An arm is a hypernetwork and its training, a net an architecture that a prediction is made for and that no hypernetwork
was trained on; a start is where a net's training begins: at random, or at the prediction of an arm.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

VISION, LANGUAGE = "vision", "lm"  # kinds of data, networks and hypernetworks
RANDOM = "random"  # the start that is no arm


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A hypernetwork: its decoder and how it is trained."""

    name: str  # in names of jobs and folders
    label: str  # as shown in tables
    kind: str = VISION
    decoder: str = "lowrank"
    max_shape: int = 512  # largest decoded sizes; wider targets are tiled
    first_steps: int = 700  # before: with a zero row for the class token, at a constant rate
    steps: int = 1700
    lr: float = 1e-3
    orders: int = 1  # data orders with which nets are trained from its predictions


@dataclass(frozen=True, kw_only=True)
class Net:
    """A transformer's size."""

    depth: int
    width: int
    heads: int

    @property
    def label(self) -> str:
        """As shown in tables, and in names of jobs."""
        return f"{self.depth}x{self.width}"


def nets(*sizes: tuple[int, int, int]) -> tuple[Net, ...]:
    """Nets of these (depth, width, heads)."""
    return tuple(Net(depth=depth, width=width, heads=heads) for depth, width, heads in sizes)


LOGAH = Arm(name="logah", label="LoGAH")
GHN3 = Arm(name="ghn3", label="GHN-3", decoder="dense", max_shape=32, lr=2.5e-4)
LOWRANK_V2 = Arm(name="lowrank-v2", label="lowrank_v2 (ours)", decoder="lowrank_v2", lr=3e-4)
LOGAH_LM = Arm(name="logah-lm", label="LoGAH", kind=LANGUAGE, first_steps=0, steps=1500, lr=3e-3)


@dataclass(frozen=True, kw_only=True)
class Space:
    """Sizes that the networks of a hypernetwork's training are drawn from, uniformly and independently."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    heads: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a result depends on besides the seed; JSON-able."""

    arms: tuple[Arm, ...] = (LOGAH, LOGAH_LM, LOWRANK_V2)
    # Hypernetworks
    hid: int = 32
    layers: int = 2
    heads: int = 4
    lora_r: int = 16
    max_ck_lora: int = 1024
    warmup: int = 100  # steps
    weight_decay: float = 1e-2
    norm_penalty: float = 3e-5  # on the norms of predicted parameters
    grad_clip: float = 5.0
    class_token_noise: float = 0.02  # while hypernetworks are trained; predictions that are scored have none
    # Vision
    vision_space: Space = Space(depths=(2, 3, 4), widths=(24, 32, 40, 48), heads=(2, 4))
    vision_batch: int = 64
    vision_nets: tuple[Net, ...] = nets((6, 64, 4), (5, 96, 6), (8, 48, 4))
    vision_lrs: tuple[float, ...] = (3e-4, 1e-3)
    epochs: int = 3
    zero_shot_nets: tuple[Net, ...] = nets(
        (2, 32, 2), (4, 48, 4), (5, 48, 4), (6, 48, 4), (8, 48, 4), (10, 48, 4), (4, 64, 4), (4, 96, 4), (4, 128, 8)
    )
    # Language
    language_space: Space = Space(depths=(2, 3, 4), widths=(32, 40, 48, 56), heads=(4,))
    language_batch: int = 16
    vocab_size: int = 512
    block_size: int = 64
    held_out_blocks: int = 200  # of text, that a net is scored on
    language_nets: tuple[Net, ...] = nets((6, 64, 4), (5, 96, 4))
    language_lrs: tuple[float, ...] = (1e-3, 3e-3)  # at 3e-4 random starts are slower still
    language_steps: tuple[int, ...] = (0, 25, 50)  # at which held-out text is scored
    early_step: int = 50  # one of them: where predicted and random starts are compared
    # further steps of some runs (net, learning rate), where random starts overtake; every run if ()
    language_more: tuple[int, ...] = (100, 150, 200, 300)
    language_longer: tuple[tuple[str, float], ...] = (("6x64", 3e-3),)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as stored in ``results.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """The settings that ``as_dict`` gave, also after a round trip through JSON."""
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        for name, kind in (("arms", Arm), ("vision_nets", Net), ("zero_shot_nets", Net), ("language_nets", Net)):
            found[name] = tuple(kind(**each) for each in values[name])
        found["language_longer"] = tuple((net, lr) for net, lr in values["language_longer"])
        for name in ("vision_space", "language_space"):
            found[name] = Space(**{key: tuple(sizes) for key, sizes in values[name].items()})
        return cls(**found)

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def arms_of(self, kind: str) -> list[Arm]:
        """The hypernetworks trained on one kind of data."""
        return [arm for arm in self.arms if arm.kind == kind]

    def nets_of(self, kind: str) -> tuple[Net, ...]:
        """The networks that are trained from every start."""
        return self.vision_nets if kind == VISION else self.language_nets

    def lrs_of(self, kind: str) -> tuple[float, ...]:
        """Learning rates that every start is trained with."""
        return self.vision_lrs if kind == VISION else self.language_lrs

    def orders_of(self, start: str, kind: str) -> int:
        """Data orders of a start's runs; a random start has those of every other."""
        return max(arm.orders for arm in self.arms_of(kind)) if start == RANDOM else self.arm(start).orders

    def points_of(self, kind: str, net: Net, lr: float) -> tuple[int, ...]:
        """Epochs (vision) or steps (language) at which a run is scored."""
        if kind == VISION:
            return tuple(range(self.epochs + 1))
        goes_on = not self.language_longer or (net.label, lr) in self.language_longer
        return self.language_steps + (self.language_more if goes_on else ())

    def space_of(self, kind: str) -> Space:
        """What hypernetworks of a kind are trained on."""
        return self.vision_space if kind == VISION else self.language_space


SMALL = Settings()
FULL = replace(
    SMALL,
    arms=(
        replace(LOGAH, orders=3),
        replace(LOGAH_LM, orders=3),
        replace(GHN3, orders=3),
        replace(LOWRANK_V2, orders=3),
    ),
    language_lrs=(3e-4, 1e-3, 3e-3),
    language_longer=(),
)

# Thresholds
START_ACCURACY = 0.18  # of predicted vision nets before training, mean of all nets
ACCURACY_GAIN = 0.08  # over random starts after training, mean of all nets and learning rates
FIRST_GAIN = 1.0  # nats per token by which a predicted language model starts below a random one
EARLY_GAIN = 0.4  # nats per token below the best random learning rate at ``early_step``
SIZE_RATIO = 4.0
