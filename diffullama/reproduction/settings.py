"""What the small reproduction runs: the specification's configuration C, its arms, and the learning rate of each."""

from dataclasses import asdict, dataclass, field, replace

from common.config import require_choice

# Peak learning rate of every arm: the better of 1e-3 and 3e-3 by the bound of held-out text (nats per token), measured
# once by ``python -m diffullama.reproduction.sweep`` with seed 100, which no reproduction uses by default.
LEARNING_RATES: dict[str, float] = {
    "ar": 3e-3,  # 4.016 with 1e-3, 3.517 with 3e-3
    "adapt": 1e-3,  # 4.774, 4.821
    "scratch-equal": 1e-3,  # 5.887, 5.910
    "scratch-total": 1e-3,  # 5.546, 5.632
    "no-shift": 3e-3,  # 5.674, 5.654
    "no-annealing": 1e-3,  # 4.772, 4.819
}
SWEPT_RATES = (1e-3, 3e-3)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One network.

    Attributes:
        name: as in file names.
        label: as in tables.
        kind: ``ar``: next-token training; ``diffusion``.
        parent: whether it starts from the AR network's weights.
        steps: optimizer steps.
        anneal_steps: over which the attention opens; 1: open from the start.
    """

    name: str
    label: str
    kind: str = "diffusion"
    parent: bool = False
    steps: int
    shift: bool = True
    anneal_steps: int = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a result depends on besides the seed; JSON-able."""

    # Data and model: byte pairs of the embedded help texts, GPT-2 with 0.93 million parameters
    source: str = "topics"
    vocab_size: int = 1024  # rows of the embedding; the last one is the mask, end-of-text is 0
    length: int = 64
    width: int = 128
    layers: int = 4
    heads: int = 4
    # Training
    ar_steps: int = 400  # a
    adapt_steps: int = 200  # d
    anneal_steps: int = 50
    ablations: bool = False  # also adapt without shift, and without annealing
    batch_size: int = 32
    learning_rates: dict[str, float] = field(default_factory=lambda: dict(LEARNING_RATES))
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    warmup: int = 50
    min_ratio: float = 0.1
    grad_clip: float = 1.0
    # Scoring, on the first test blocks; none of them shares a document with the training text
    test_blocks: int = 192
    draws: int = 8  # network rows per block and bound
    cloze_positions: int = 5  # single masked tokens per block
    span: int = 8  # tokens of a hidden span
    span_starts: tuple[int, ...] = (12, 28, 44)  # of the spans whose loss is compared with and without suffix
    infill_blocks: int = 96  # whose middle span is written
    held_out_blocks: int = 48  # of the curve
    held_out_points: int = 8  # of the curve
    shown: int = 4  # infilled texts in the report

    def as_dict(self) -> dict:
        """Plain values, as stored in ``results.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Settings":
        """The settings that ``as_dict`` gave, also after a round trip through JSON."""
        return cls(**{**values, "span_starts": tuple(values["span_starts"])})

    @property
    def mask_id(self) -> int:
        return self.vocab_size - 1

    def arms(self) -> list[Arm]:
        """The networks in the order of the tables."""
        a, d = self.ar_steps, self.adapt_steps
        annealed = {"steps": d, "anneal_steps": self.anneal_steps}
        found = [
            Arm(name="ar", label="AR parent", kind="ar", steps=a),
            Arm(name="adapt", label="adapt", parent=True, **annealed),
            Arm(name="scratch-equal", label="scratch=", **annealed),
            Arm(name="scratch-total", label="scratch+", steps=a + d, anneal_steps=self.anneal_steps),
        ]
        if self.ablations:
            found += [
                Arm(name="no-shift", label="adapt, no shift", parent=True, shift=False, **annealed),
                Arm(name="no-annealing", label="adapt, no annealing", parent=True, steps=d),
            ]
        return found

    def arm(self, name: str) -> Arm:
        """The arm called ``name``."""
        arms = {arm.name: arm for arm in self.arms()}
        require_choice("arm", name, tuple(arms))
        return arms[name]


SMALL = Settings()
FULL = replace(SMALL, ablations=True)

# Thresholds, nats per token. Source: specification 10.
BELOW_SCRATCH_EQUAL = 0.5
BELOW_SCRATCH_TOTAL = 0.2
BOUND_LIMIT = 5.4
CLOZE_BELOW_SCRATCH_TOTAL = 0.3
SUFFIX_GAIN_ERRORS = 2.0
ESTIMATOR_ERRORS = 3.0
SHIFT_COST = 0.3
ANNEALING_HARM = 0.1
