"""Evaluates RADD: zero-shot perplexity of a model, or generative perplexity of samples.

    python -m radd.evaluate model_path=runs/first valid_dataset=embedded estimator=low_variance work_dir=logs/first
    python -m radd.evaluate model_path=JingyangOu/radd-lambda-dce valid_dataset=ptb loss_type=lambda_DCE
    python -m radd.evaluate task=generative_perplexity samples=runs/first/samples.jsonl scorer=gpt2-large
    torchrun --nproc-per-node 4 -m radd.evaluate model_path=runs/first valid_dataset=wikitext103

The same command again continues an evaluation that was interrupted.
"""

import sys

from common import cli
from common.parallel import start
from radd.evaluation import EvaluateConfig, evaluate


def main() -> int:
    """The command line."""
    return cli.run(run, "evaluate", EvaluateConfig)


def run(config: EvaluateConfig) -> int:
    """Evaluates as configured, on this process's share."""
    with start("ddp") as parallel:
        evaluate(config, parallel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
