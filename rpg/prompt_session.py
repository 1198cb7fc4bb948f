"""A session of prompts: what was understood, the networks that come of it, how well they do."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch

from common.errors import ConfigError, QuintetError
from common.parallel import Parallel
from rpg.generation_run import Generation, write_networks
from rpg.loading import LoadedGenerator, load_generator
from rpg.prompt_config import PromptConfig
from rpg.prompting import build_chat, class_names, prompt_vector
from rpg.requests import Condition, check_condition, label_of_vector, vector_conditions

ENDINGS = ("exit", "quit", "q")


class PromptSession:
    """Models loaded once; ``run`` serves one prompt.

    Raises: CheckpointError for a chat model or generator that cannot be loaded; ConfigError if the generator does not
        take a vector of these classes.
    """

    def __init__(self, config: PromptConfig, say: Callable[[str], object] = print) -> None:
        self.config, self.say = config, say
        self.names = class_names(config.classes)
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device)
        self.chat = build_chat(
            config.chat_model,
            self.device,
            decision=config.decision,
            max_new_tokens=config.max_new_tokens,
            sample=config.sample,
            seed=config.seed,
        )
        self.loaded: LoadedGenerator | None = None
        if config.generator is not None:
            self.loaded = load_generator(config.generator, self.device, use_ema=config.ema, structure=config.structure)
            size = self.loaded.config.condition_size if self.loaded.config.condition != "none" else 0
            if size != len(self.names):
                takes = f"takes a condition of {size} numbers" if size else "is unconditional"
                raise ConfigError(
                    f"generator={config.generator} {takes}, but classes={config.classes} are {len(self.names)}; give "
                    "the names of the classes that it was trained for, or a class-conditional generator."
                )
        if config.expected is not None:
            check_condition(config.expected, len(self.names), "expected")

    def run(self, prompt: str) -> tuple[tuple[int, ...], Generation | None]:
        """The vector of a prompt and the networks generated for it (None without a generator), shown as they come.

        Raises: ConfigError for a prompt that is not understood.
        """
        started = time.perf_counter()
        vector = prompt_vector(prompt, self.names, self.chat, reading=self.config.reading)
        chosen = [name for name, bit in zip(self.names, vector, strict=True) if bit]
        label = label_of_vector(vector, "vector" + "".join(map(str, vector)))
        self.say(f"{', '.join(chosen) or 'no class'}: {list(vector)} ({label}), {time.perf_counter() - started:.1f} s")
        if self.config.expected is not None:
            wanted = [int(value) for value in self.config.expected]
            wrong = [name for name, bit, want in zip(self.names, vector, wanted, strict=True) if bit != want]
            self.say(f"expected {wanted}: {'as understood' if not wrong else 'differs in ' + ', '.join(wrong)}")
        if self.loaded is None:
            return vector, None
        if len(set(vector)) == 1:
            raise ConfigError(f"the prompt {prompt!r} chooses {'all' if vector[0] else 'no'} classes: that is no task.")
        generation = self._generate(vector)
        self.say(generation.summary())
        return vector, generation

    def _generate(self, vector: tuple[int, ...]) -> Generation:
        config = self.config.generation([float(bit) for bit in vector])
        (condition,) = vector_conditions(config.vectors, len(self.names))
        label = condition.label
        if self.config.expected is not None:
            # testers read the task from the name: the networks are judged by what was meant
            label = label_of_vector([float(value) for value in self.config.expected], label)
        parallel = Parallel(0, 1, 0, self.device)
        return write_networks(config, self.loaded, [Condition(condition.values, label)], parallel)


def read_prompts(config: PromptConfig, stream: TextIO | None = None) -> Iterator[str]:
    """The prompt of the command, or those typed (or piped in) until ``exit`` or the end of the input."""
    if config.prompt is not None:
        yield config.prompt
        return
    stream = stream or sys.stdin
    while True:
        if stream.isatty():
            print("prompt> ", end="", flush=True)
        line = stream.readline()
        if not line or line.strip().lower() in ENDINGS:
            return
        if line.strip():
            yield line.strip()


def run_session(config: PromptConfig, stream: TextIO | None = None) -> int:
    """Serves all prompts; a prompt that fails in a session is reported and the next one is read.

    Returns: how many failed.

    Raises: ConfigError if the only prompt is not understood.
    """
    session = PromptSession(config)
    failures = 0
    for prompt in read_prompts(config, stream):
        try:
            session.run(prompt)
        except QuintetError as error:
            if config.prompt is not None:
                raise
            failures += 1
            print(f"error: {error}", file=sys.stderr)
    if config.generator is not None:
        print(f"networks are in {Path(config.output)}")
    return failures
