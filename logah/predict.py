"""Predicts all weights of a network in one pass of a hypernetwork and streams them to safetensors files.

    python -m logah.predict target=gpt2-large checkpoint=runs/logah-gpt2 out=predictions/gpt2-large
    python -m logah.predict target=torchvision:resnet50 checkpoint=ghn3tm8.pt out=predictions/resnet50
    python -m logah.predict target=llama-8b checkpoint=runs/logah-llama dtype=bf16 out=predictions/llama-8b

``AutoModelForCausalLM.from_pretrained(OUT)`` of transformers loads a language model, ``logah.prediction_folder``'s
``load_prediction(OUT)`` any network. Options: ``--help``.
"""

import sys

from common.cli import run
from logah.predict_config import PredictConfig
from logah.prediction_run import run_prediction


def main(config: PredictConfig) -> None:
    report = run_prediction(config)
    print(f"{config.out}: {report.summary()}")


if __name__ == "__main__":
    sys.exit(run(main, "predict", PredictConfig, "configs/logah"))
