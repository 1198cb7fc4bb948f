"""Writes texts with an adapted model and prints each, followed by a line of 92 equals signs.

    python -m diffullama.generate model_path=runs/adapted prompt="The quick" num_samples=4 length=64
    python -m diffullama.generate model_path=runs/adapted prompt="The quick" suffix=" dog." max_new_tokens=8 show=true
    python -m diffullama.generate model_path=runs/adapted order=confidence animation=runs/adapted/denoising.html
    torchrun --nproc-per-node 2 -m diffullama.generate model_path=runs/adapted prompts=prompts.jsonl output=texts.jsonl

The flags of the released quick-start scripts work too: ``--model_name diffusionfamily/diffugpt-s --diffusion_steps 64
--logits_temp 0.95 --topp_temp 0.9 --shift True``. Options: ``--help``.
"""

import sys
from collections.abc import Sequence

from common import cli
from common.generation.sample_file import texts
from common.parallel import start
from diffullama.generate_config import GenerateConfig
from diffullama.generation import generate

RELEASED_FLAGS = {
    "--model_name": "model_path",
    "--base_model_name": "base",
    "--shift": "shift",
    "--diffusion_steps": "diffusion_steps",
    "--logits_temp": "logits_temp",
    "--topp_temp": "topp_temp",
    "--verbose": "show",
    "--flash_attn": "attn_implementation",
}


def translate_flags(arguments: Sequence[str]) -> list[str]:
    """``--flag value`` and ``--flag=value`` of the released scripts as ``option=value``; everything else unchanged.

    Booleans are read as written; the released scripts take any text for true.
    """
    translated, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        has_value = equals or (rest and not rest[0].startswith("--"))
        if flag in RELEASED_FLAGS and has_value:
            translated.append(f"{RELEASED_FLAGS[flag]}={value if equals else rest.pop(0)}")
        else:
            translated.append(argument)  # what remains is for Hydra to accept or to refuse
    return translated


def main() -> int:
    sys.argv[1:] = translate_flags(sys.argv[1:])
    return cli.run(run, "generate", GenerateConfig, "configs/diffullama")


def run(config: GenerateConfig) -> None:
    """Writes the texts on this process's share; the main one prints all of them."""
    with start("ddp") as parallel:
        generation = generate(config, parallel)
        if parallel.is_main:
            sys.stdout.write(texts(generation.records))
            sys.stdout.flush()
            print(generation.summary(), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
