"""What the small reproduction runs: three collections of checkpoints, generators trained on them, ways to draw.

A collection is a folder of checkpoints, an arm a generator trained on one, a draw a sampler and a number of networks.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

DIGITS, SEEDS, TASKS = "digits", "seeds", "tasks"  # collections


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Networks drawn from a generator with one sampler."""

    name: str  # in names of jobs
    kind: str = "trailing"
    steps: int = 50
    eta: float = 1.0
    networks: int = 20

    @property
    def label(self) -> str:
        """As shown in tables."""
        names = {"ddpm": "DDPM {0}", "ddim": "DDIM {0}, eta {1:g} (reference)", "trailing": "trailing {0}, eta {1:g}"}
        return names[self.kind].format(self.steps, self.eta)


TRAILING = Draw(name="trailing50")
REFERENCE = Draw(name="ddim60", kind="ddim", steps=60, eta=0.05)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A generator: its collection, what tells its networks apart, and how long it trains."""

    name: str  # in names of jobs and folders
    label: str  # as shown in tables
    collection: str
    groups: str = "auto"  # permutation states, as data.groups
    condition: str = "none"  # how the class vector enters: none, full, gated
    gate: tuple[str, ...] = ()  # gated: patterns of the tensors that see the condition; (): the last eight tokens
    normalisation: str = "layer"
    steps: int = 1500
    batch_size: int = 8
    diffusion_batch: int = 128
    lr: float = 3e-3
    prediction: str = "noise"  # what the denoiser puts out: noise, x0 or v
    draws: tuple[Draw, ...] = (TRAILING,)

    @property
    def cost(self) -> float:
        """Of its training, relative to others: the denoiser's rows, and the stack once per distinct condition."""
        return self.steps * (self.diffusion_batch + 8 * (self.batch_size if self.condition != "none" else 1))


UNCONDITIONAL = Arm(
    name="digits",
    label="per layer",
    collection=DIGITS,
    steps=2500,
    draws=(
        TRAILING,
        Draw(name="trailing100", steps=100),
        Draw(name="deterministic50", eta=0.0),
        REFERENCE,
        Draw(name="ddpm1000", kind="ddpm", steps=1000, networks=6),
    ),
)
RESIDUAL = Arm(name="digits-residual", label="residual", collection=DIGITS, normalisation="residual", steps=1000)
STATES = Arm(
    name="states",
    label="one permutation state per seed",
    collection=SEEDS,
    groups="seed",
    steps=3000,
    draws=(TRAILING, REFERENCE),
)
NO_STATE = Arm(name="no-state", label="no permutation state", collection=SEEDS, groups="none", steps=500)
STATE_PER_FILE = Arm(name="state-per-file", label="one state per checkpoint", collection=SEEDS, groups="file")
CONDITIONAL = Arm(
    name="tasks",
    label="full condition, residual, x0 prediction",
    collection=TASKS,
    groups="none",
    condition="full",
    normalisation="residual",
    batch_size=16,
    diffusion_batch=192,
    lr=2e-3,
    prediction="x0",
)
PER_LAYER = replace(
    CONDITIONAL,
    name="tasks-layer",
    label="full condition, per layer, noise prediction",
    normalisation="layer",
    prediction="noise",
    steps=2500,
)
GATED = replace(
    PER_LAYER, name="tasks-gated", label="gated, all tokens, per layer", condition="gated", gate=("*",), steps=2000
)
GATED_LAST = replace(GATED, name="tasks-gated8", label="gated, last 8 tokens, per layer (reference)", gate=())


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a result depends on besides the seed; JSON-able."""

    # Collections
    epochs: int = 30  # of a digit network's training
    checkpoints: int = 150  # kept of one training
    trainings: int = 4  # independent ones, for the permutation states
    checkpoints_each: int = 40
    seen: int = 400  # tasks that the generator learns from
    unseen: int = 60
    task_steps: int = 300
    task_checkpoints: int = 3  # kept per task
    # Generators: 291,641 parameters for the digits
    dim_per_token: int = 128
    d_state: int = 32
    channels: tuple[int, ...] = (1, 16, 32, 16, 1)
    d_condition: int = 128
    arms: tuple[Arm, ...] = (UNCONDITIONAL, RESIDUAL, STATES, NO_STATE, CONDITIONAL)
    # Scoring
    noise_levels: tuple[float, ...] = (0.02, 0.05, 0.1)
    noised: int = 30  # originals perturbed at each level
    pairs: int = 20  # of originals that are interpolated
    task_noise: float = 0.2
    drawn_tasks: int = 60  # seen and unseen tasks for which one network each is drawn

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as stored in ``results.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """The settings that ``as_dict`` gave, also after a round trip through JSON."""
        tuples = {each.name for each in fields(cls) if isinstance(each.default, tuple)}
        found = {name: tuple(value) if name in tuples else value for name, value in values.items()}
        return cls(**{**found, "arms": tuple(arm_from_dict(arm) for arm in found["arms"])})

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def arms_of(self, collection: str) -> list[Arm]:
        """The generators trained on one collection."""
        return [arm for arm in self.arms if arm.collection == collection]


def arm_from_dict(values: dict[str, Any]) -> Arm:
    """The arm that ``dataclasses.asdict`` gave."""
    draws = tuple(Draw(**draw) for draw in values["draws"])
    return Arm(**{**values, "gate": tuple(values["gate"]), "draws": draws})


SMALL = Settings()
FULL = replace(
    SMALL,
    arms=(
        replace(
            UNCONDITIONAL,
            draws=tuple(replace(draw, networks=20) for draw in UNCONDITIONAL.draws),
        ),
        RESIDUAL,
        STATES,
        NO_STATE,
        STATE_PER_FILE,
        CONDITIONAL,
        PER_LAYER,
        GATED,
        GATED_LAST,
    ),
)

# Thresholds
ACCURACY_LOSS = 0.005  # of generated networks, mean below the originals' mean
WORST_LOSS = 0.01  # of the worst generated network below the worst original
COPY_STEPS = 3.0  # least distance from any original, in distances of consecutive checkpoints
EVALUATIONS_RATIO = 15  # by which few-step sampling is cheaper than the full chain
SIGMAS = 2.0  # joint standard errors within which two mean accuracies count as equal
STATES_LOSS = 0.015  # with permutation states, mean below the originals' mean
NO_STATE_LIMIT = 0.30
MEAN_NETWORK_LIMIT = 0.5
UNSEEN_ACCURACY = 0.92
ABOVE_MAJORITY = 0.95  # share of unseen tasks
WRONG_TASK_LIMIT = 0.60
