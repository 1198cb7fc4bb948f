"""From a sentence to a network: which classes are meant, and a classifier for them from a class-conditional generator.

    python -m rpg.prompt "select all living things"                                        shows the vector only
    python -m rpg.prompt "select all even digits" classes=digits generator=runs/tasks test=true
    python -m rpg.prompt "find everything that flies" chat_model=Qwen/Qwen2.5-3B-Instruct generator=runs/tasks
    python -m rpg.prompt generator=runs/tasks                                              asks for prompts until `exit`

Options: ``--help``.
"""

import re
import sys

from common.cli import run
from rpg.prompt_config import PromptConfig
from rpg.prompt_session import run_session


def main(config: PromptConfig) -> None:
    run_session(config)


def with_prompt_option(arguments: list[str]) -> list[str]:
    """Arguments with the words that are neither ``key=value`` nor a flag as the option ``prompt``."""
    is_option = re.compile(r"--?\w[\w-]*(?:=.*)?|[+~]{0,2}[\w./@]+=.*", re.DOTALL)
    options, words, values = [], [], 0
    for argument in arguments:
        if values:
            options.append(argument)
            values -= 1
        elif is_option.fullmatch(argument):
            options.append(argument)
            # the flags of Hydra that take a value
            values = int(argument in ("--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--info", "-i"))
        else:
            words.append(argument)
    if not words:
        return options
    quoted = " ".join(words).replace("\\", "\\\\").replace("'", "\\'")
    # first, because Hydra's parser takes no options after a flag's value
    return [f"prompt='{quoted}'", *options]


if __name__ == "__main__":
    sys.argv[1:] = with_prompt_option(sys.argv[1:])
    sys.exit(run(main, "prompt", PromptConfig, "configs/rpg", print_config=False))
