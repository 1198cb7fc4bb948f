"""Options of ``python -m rpg.prompt``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from common.config import PRECISIONS, require_at_least, require_choice
from common.errors import ConfigError
from rpg.checkpoint_files import FORMATS
from rpg.generation_config import GenerateConfig, SamplingOverrides
from rpg.prompting import DECISIONS, READINGS
from rpg.testing import TesterSection


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Options of ``python -m rpg.prompt``."""

    prompt: str | None = None  # the first words of the command that are no option; null: asked for, one after another
    expected: Any = None  # the right vector, to test against instead of the understood one: [0,0,1,...]

    chat_model: str = "rules"  # chat model: folder or hub name, e.g. Qwen/Qwen2.5-3B-Instruct; rules: a table of words
    classes: Any = "cifar10"  # names in the order of the condition: cifar10, digits, a text file, or a list
    reading: Literal["words", "letters"] = "words"  # letters: any "no" in an answer means no, as released
    decision: Literal["generate", "likelihood"] = "generate"  # likelihood: compare YES and NO as the next token
    max_new_tokens: int = 512  # of an answer
    sample: bool = False  # draw the answer's words as the chat model's settings say; false: the likeliest

    generator: str | None = None  # class-conditional generator; null: show the vector only
    structure: str | None = None  # of a released .pth: its structure.cache; null: the one beside it
    ema: bool = True
    device: str | None = None  # null: the GPU, else the CPU
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    num_generated: int = 1  # networks per prompt
    states: Any = "auto"
    seed: int = 0
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    rows_per_pass: int = 512
    output: str = "prompted"  # folder; later prompts for the same classes go on with the next number
    format: Literal["pth", "safetensors", "peft"] = "pth"
    tag: str | None = None
    test: bool = False  # test each network on the task of the vector
    tester: TesterSection = field(default_factory=TesterSection)

    def __post_init__(self) -> None:
        for name, choices in (
            ("reading", READINGS), ("decision", DECISIONS), ("precision", PRECISIONS), ("format", FORMATS),
        ):  # fmt: skip
            require_choice(name, getattr(self, name), choices)
        for name in ("max_new_tokens", "num_generated", "rows_per_pass"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("seed", self.seed, 0)
        if self.test and self.generator is None:
            raise ConfigError("test=true tests generated networks; set generator=RUN.")
        if not self.chat_model:
            raise ConfigError("chat_model is empty; give a folder or hub name, or chat_model=rules.")

    def generation(self, vector: list[float]) -> GenerateConfig:
        """The options of generating networks for a vector."""
        shared = (
            "generator", "structure", "ema", "device", "precision", "num_generated", "states", "seed", "sampling",
            "rows_per_pass", "output", "format", "tag", "test", "tester",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in shared}
        return GenerateConfig(**values, vectors=[vector], append=True, progress=False)
