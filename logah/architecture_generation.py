"""Makes a set of architectures and describes it; ``python -m logah.generate_architectures`` is its command."""

from dataclasses import dataclass
from pathlib import Path

from numpy.random import RandomState

from common import provenance
from common.config import require_at_least, require_choice
from common.errors import ConfigError, DataError
from common.report.page import write_atomically
from common.report.tables import Table
from logah.architecture_sets import read_architectures, write_architectures
from logah.architecture_stats import count_parameters, depth_table, parameter_histogram, size_table
from logah.architectures import Architecture
from logah.generators import FAMILY_OF_LAW, LAWS

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class GenerateArchitecturesConfig:
    set: str = "vits1k"  # vits1k, gpts1k, llama1k or llama_trainer
    count: int = 1000  # networks
    seed: int = 1  # of numpy's legacy generator; 1 gives the published networks
    image_size: int = 32  # vits1k: 224 is ImageNet's, with patches of 16 and 32
    num_classes: int = 10  # vits1k
    patch_sizes: tuple[int, ...] | None = None  # vits1k; null: 2 and 4 (16 and 32 with image_size=224)
    vocab_size: int | None = None  # language models; null: 50257 (GPT-2), 128256 (Llama)
    out: str | None = None  # JSONL file to write
    describe: str | None = None  # JSONL file to describe instead of drawing a set
    figure: str | None = None  # PNG file for a histogram of the parameters
    overwrite: bool = False  # replace out and figure if they are there

    def __post_init__(self) -> None:
        require_choice("set", self.set, tuple(LAWS))
        for name in ("count", "image_size", "num_classes"):
            require_at_least(name, getattr(self, name), 1)
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError(f"seed={self.seed} must lie between 0 and {LARGEST_SEED}, numpy's range.")
        if (self.out is None) == (self.describe is None):
            raise ConfigError("either out=FILE.jsonl (write a set) or describe=FILE.jsonl (look at one) is needed.")
        if self.figure is not None and Path(self.figure).suffix != ".png":
            raise ConfigError(f"figure={self.figure} must end in .png.")
        for name in ("out", "figure"):
            path = getattr(self, name)
            if path is not None and Path(path).exists() and not self.overwrite:
                raise DataError(f"{name}={path} exists; add overwrite=true, or choose another file.")


@dataclass(frozen=True)
class GeneratedSet:
    architectures: list[Architecture]
    tables: tuple[Table, ...]


def draw_set(config: GenerateArchitecturesConfig) -> list[Architecture]:
    """``config.count`` networks of the law ``config.set``, one after the other from one generator.

    Raises: ConfigError for patches that do not fill the image.
    """
    if FAMILY_OF_LAW[config.set] == "vit":
        options = {
            "image_size": config.image_size, "num_classes": config.num_classes, "patch_sizes": config.patch_sizes,
        }  # fmt: skip
    else:
        options = {} if config.vocab_size is None else {"vocab_size": config.vocab_size}
    rng = RandomState(config.seed)
    return [LAWS[config.set](rng, **options) for _ in range(config.count)]


def generate_set(config: GenerateArchitecturesConfig) -> GeneratedSet:
    """Draws and writes a set, or reads one; writes the histogram if it is asked for."""
    if config.describe is not None:
        architectures = read_architectures(Path(config.describe))
    else:
        architectures = draw_set(config)
        write_architectures(Path(config.out), architectures, overwrite=config.overwrite)
    counts = [count_parameters(architecture) for architecture in architectures]
    if config.figure is not None:
        write_atomically(Path(config.figure), parameter_histogram(counts).light_png)
    return GeneratedSet(architectures, (size_table(architectures, counts), depth_table(architectures, counts)))


def provenance_line(config: GenerateArchitecturesConfig) -> str:
    """What a written set is the result of."""
    revision = provenance.git_revision() or "unknown"
    return f"{config.out}: {config.count} networks of {config.set}, seed {config.seed}, revision {revision}"
