"""Options of collecting low-rank adapters (``recipe.adapters.*``)."""

from dataclasses import dataclass, field
from typing import Literal

from common.config import require_at_least, require_choice
from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdapterSection:
    """Low-rank adapters of a causal language model: fine-tuned here, or taken over from a run elsewhere.

    Source: DoRA experiments of "Recurrent Diffusion for Large-Scale Parameter Generation" (arXiv 2501.11587).
    """

    model: str | None = None  # folder or hub name of the language model; tiny: a small one is made; null with watch
    text: str = "embedded:topics"  # corpus, see common.data.corpora; a path is a text, .jsonl or .csv file
    tokenizer: str | None = None  # null: the model's own; byte: one token per byte
    length: int = 256  # tokens per row
    rank: int = 16
    alpha: float | None = None  # null: twice the rank
    dropout: float = 0.05
    dora: bool = True  # weight-decomposed: a magnitude per output beside the two factors
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    batch_size: int = 16
    micro_size: int = 4  # rows per forward pass
    lr: float = 2e-4
    warmup: int = 20  # steps
    weight_decay: float = 0.0
    steps: int = 200  # before the first adapter is kept; then one is kept every `interval` steps
    interval: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"  # of the model and the forward pass; adapters are float32
    test_rows: int = 32  # held-out rows of the loss and the accuracy of the next token
    watch: str | None = None  # take over adapters that another program writes below this folder
    keep: int = 50  # watch: the newest so many stay
    poll_seconds: float = 10.0  # watch: time between looks
    idle_seconds: float = 3600.0  # watch: stop when nothing new has come for so long

    def __post_init__(self) -> None:
        if self.model is None and self.watch is None:
            raise ConfigError(
                "recipe.adapters.model is not set; give the folder of a language model, or recipe.adapters.watch=DIR "
                "to take over adapters of a run elsewhere."
            )
        require_choice("adapters.precision", self.precision, ("bf16", "fp32"))
        for name in ("length", "rank", "batch_size", "micro_size", "interval", "keep", "test_rows"):
            require_at_least(f"adapters.{name}", getattr(self, name), 1)
        for name in ("steps", "warmup", "lr", "poll_seconds", "idle_seconds"):
            require_at_least(f"adapters.{name}", getattr(self, name), 0)
        if self.batch_size % self.micro_size:
            raise ConfigError(
                f"adapters.batch_size={self.batch_size} is not a multiple of adapters.micro_size={self.micro_size}; "
                f"use micro_size={next(n for n in range(self.micro_size, 0, -1) if self.batch_size % n == 0)}."
            )
        if not self.targets:
            raise ConfigError("adapters.targets is empty; name linear layers, for example [q_proj, v_proj].")
