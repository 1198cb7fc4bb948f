"""Scores images: FID, sFID, Inception Score, precision and recall, folder FID, CLIP score, GenEval.

    python -m mup_dit.evaluate samples=runs/digits/samples reference=digits split=train features=digits
    python -m mup_dit.evaluate samples=samples.npz reference=VIRTUAL_imagenet256_labeled.npz
    python -m mup_dit.evaluate samples=coco_samples reference=val2014 metrics=[clean_fid,clip_score]
    python -m mup_dit.evaluate samples=geneval_samples metrics=[geneval]

Options: ``--help``.
"""

import sys

from common import cli
from common.parallel import start
from mup_dit.evaluation import evaluate
from mup_dit.evaluation_config import EvaluateConfig


def main() -> int:
    """The command line."""
    return cli.run(run, "evaluate", EvaluateConfig, "configs/mup_dit")


def run(config: EvaluateConfig) -> int:
    """Evaluates as configured, on this process's share."""
    with start("ddp") as parallel:
        evaluate(config, parallel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
