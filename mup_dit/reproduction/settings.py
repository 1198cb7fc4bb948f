"""What the small reproduction runs: the specification's section 10."""

from dataclasses import asdict, dataclass, fields, replace

from mup_dit.building import ModelConfig
from mup_dit.dit import DiTConfig

REPEATS = 3
LABELS = {"mup": "muP", "sp": "SP", "mup_init": "muP init + AdamW"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a result depends on besides the seed; JSON-able."""

    # Networks: DiT on the 8 x 8 digits
    depth: int = 2
    patch_size: int = 2
    head_size: int = 16
    base_heads: int = 4  # base width 64
    # The sweep
    parametrizations: tuple[str, ...] = ("mup", "sp")
    heads: tuple[int, ...] = (2, 4, 8)  # widths 32, 64, 128
    loglrs: tuple[float, ...] = (-9, -8, -7, -6, -5, -4)
    repeated_rates: tuple[float, ...] = (-6,)  # run thrice at the widest: near the edge divergence is luck
    ema: float = 0.95  # networks are judged by weights averaged over about 20 steps; single ones jump
    steps: int = 200
    batch_size: int = 64
    validation_draws: int = 8  # (time, noise) of every held-out image, the same for all runs
    validation_points: int = 4  # held-out losses along the widest muP runs
    log_interval: int = 10  # steps whose training losses are averaged
    # Convergence at the widest: muP at the narrowest one's rate against SP at the customary one
    customary_lr: float = 1e-4
    convergence_factor: float = 2.9  # how much longer SP trains
    # Coordinate check
    check_depth: int = 4
    check_heads: tuple[int, ...] = (1, 2, 4, 8, 16)
    check_steps: int = 4
    check_seeds: int = 3
    check_loglr: float = -7

    def as_dict(self) -> dict:
        """Plain values, as stored in ``results.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Settings":
        """The settings that ``as_dict`` gave, also after a round trip through JSON."""
        tuples = {field.name for field in fields(cls) if isinstance(field.default, tuple)}
        return cls(**{name: tuple(value) if name in tuples else value for name, value in values.items()})

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(heads * self.head_size for heads in self.heads)

    def repeats(self, heads: int, loglr: float) -> int:
        """How many seeds a run is averaged over, per seed of the reproduction; the same for all parametrisations."""
        return REPEATS if heads == max(self.heads) and loglr in self.repeated_rates else 1

    @property
    def convergence_steps(self) -> int:
        return round(self.convergence_factor * self.steps)

    def network(self, parametrization: str, heads: int, depth: int | None = None) -> ModelConfig:
        """A network of the reproduction."""
        network = DiTConfig(
            depth=depth or self.depth,
            hidden_size=heads * self.head_size,
            num_heads=heads,
            patch_size=self.patch_size,
            input_size=8,
            in_channels=1,
            num_classes=10,
            learn_sigma=False,
        )
        return ModelConfig(parametrization=parametrization, network=network, base_heads=self.base_heads)


SMALL = Settings()
FULL = replace(SMALL, parametrizations=("mup", "sp", "mup_init"))
CHECKED = ("mup", "sp", "mup_init")  # by the coordinate check

# Thresholds. Source: specification 10.
SP_EDGE_DROP = 2.0  # octaves by which the edge of SP falls from the narrowest to the widest
SP_REGRET = 0.20
