"""Options of ``python -m rpg.collect``."""

from dataclasses import dataclass
from typing import Literal

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from rpg.zoo.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Options of ``python -m rpg.collect``."""

    recipe: Recipe
    output: str  # folder of the checkpoints; the same command again continues in it
    processes: int = 1  # trainings at a time, of recipes with several tasks or seeds; GPUs are dealt out in turn
    format: Literal["pth", "safetensors"] = "pth"
    device: str | None = None  # null: the GPU if there is one
    state_interval_seconds: float = 60.0  # least time between two states that an interrupted training continues from
    progress: bool = True  # a line per epoch on stderr

    def __post_init__(self) -> None:
        require_at_least("processes", self.processes, 1)
        require_at_least("state_interval_seconds", self.state_interval_seconds, 0)
        require_choice("format", self.format, ("pth", "safetensors"))
        if not self.output:
            raise ConfigError("output is empty; give a folder, for example output=checkpoints/digits.")
        if self.recipe.method == "adapters" and self.processes > 1:
            raise ConfigError(f"processes={self.processes}: adapters come from one training; set processes=1.")
