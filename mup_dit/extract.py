"""Caches features: latents' mean and standard deviation by a VAE, caption features by T5; the same command goes on.

    python -m mup_dit.extract dataset=digits size=8 channels=1 vae=identity text=small output=features/digits
    python -m mup_dit.extract dataset=imagefolder:imagenet vae=ema flips=true output=features/imagenet256
    python -m mup_dit.extract dataset=sa1b:SA1B vae=ema text=DeepFloyd/t5-v1_1-xxl crop=pixart output=features/sa1b
    torchrun --nproc-per-node 8 -m mup_dit.extract dataset=imagefolder:imagenet output=features/imagenet256

Training reads them as ``data.train=features:DIR`` and samples the posterior anew at every load.
"""

import sys

from common.cli import run
from common.parallel import start
from mup_dit.extract_config import ExtractConfig, extract_features


def main() -> int:
    """The command line."""
    return run(extract, "extract", ExtractConfig, "configs/mup_dit", print_config=False)


def extract(config: ExtractConfig) -> int:
    """Extracts as configured and prints what was done."""
    with start("ddp") as parallel:
        summary = extract_features(config, parallel)
        if parallel.is_main:
            print(f"{config.output}: {', '.join(f'{count} {name}' for name, count in summary.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
