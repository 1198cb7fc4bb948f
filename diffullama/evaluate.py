"""Evaluates an adapted model, or its autoregressive parent, on the paper's tasks.

    python -m diffullama.evaluate model_path=runs/first tasks=[nelbo,hellaswag] work_dir=runs/first/evaluation
    python -m diffullama.evaluate model_path=gpt2 mode=causal tasks=[piqa] data.piqa=piqa.jsonl limit=100
    torchrun --nproc-per-node 4 -m diffullama.evaluate model_path=diffusionfamily/diffugpt-s tasks=[hellaswag]

The same command again continues an evaluation that was interrupted.
"""

import sys

from common import cli
from common.parallel import start
from diffullama.evaluation import EvaluateConfig, evaluate


def main() -> int:
    """The command line."""
    return cli.run(run, "evaluate", EvaluateConfig, "configs/diffullama")


def run(config: EvaluateConfig) -> int:
    """Evaluates as configured, on this process's share."""
    with start("ddp") as parallel:
        evaluate(config, parallel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
