"""What the small reproduction runs: the specification's hyperparameters, and the sizes of its experiments."""

from dataclasses import asdict, dataclass, replace

from radd.losses import LOSS_TYPES


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a result depends on besides the seed; JSON-able."""

    # Data and model: bytes of the embedded help texts, 116,225 parameters
    source: str = "topics"  # part of the embedded text: the help topics, 6,713 training blocks
    length: int = 64
    hidden_size: int = 64
    n_blocks: int = 2
    n_heads: int = 4
    # Training
    loss_types: tuple[str, ...] = LOSS_TYPES
    geometric_losses: tuple[str, ...] = ()  # losses also trained under geometric noise
    steps: int = 1000
    batch_size: int = 32
    lr: float = 4e-3
    beta1: float = 0.9
    beta2: float = 0.98
    warmup: int = 50
    min_ratio: float = 0.05
    grad_clip: float = 1.0
    # Scoring, on the first test blocks
    test_sequences: int = 256
    draws: int = 32  # independent masks per sequence and estimator
    orders: int = 4  # random orders per sequence; each costs as many network calls as there are tokens
    ordered_losses: tuple[str, ...] = ("lambda_DCE",)  # losses whose networks are scored over orders
    # Sampling
    nfe_steps: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    nfe_rows: int = 16
    # Precision of categorical draws: Zipf over 8000 tokens
    zipf_tokens: int = 8000
    zipf_length: int = 48
    zipf_steps: int = 1024
    zipf_rows: int = 6  # of each one-stage mode; the two-stage form needs no loop over steps and gets 40 times more
    ngrams: bool = False  # n-gram baselines besides the unigram

    def as_dict(self) -> dict:
        """Plain values, as stored in ``results.json``."""
        return asdict(self)


SMALL = Settings()
FULL = replace(
    SMALL,
    geometric_losses=("t_DCE",),
    orders=8,
    ordered_losses=LOSS_TYPES,
    nfe_rows=128,
    zipf_rows=24,
    ngrams=True,
)

BOUND_LIMIT = 2.65  # nats per byte: every cell of the bound table must lie below
SIGMAS = 3.0  # estimators against each other, calls against their expectation, tail share against the truth
