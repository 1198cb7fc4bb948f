"""What a training run leaves behind at intervals: averaged weights, texts sampled with them, and their perplexity.

Dimensions: B texts, L positions.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from common.checkpoint import export_weights
from common.data.tokenizer import Tokenizer
from common.diffusion.absorbing import SampleResult, sample_event_driven, sample_ordered
from common.diffusion.orders import build_order
from common.diffusion.schedules import Schedule, build_schedule
from common.errors import DataError
from common.provenance import collect
from common.seeding import derive_seed
from common.trainer import TrainState
from radd.config import TrainConfig
from radd.loading import REFERENCE_CONFIG, reference_config, save_reference_checkpoint
from radd.model import RADD

logger = logging.getLogger(__name__)

SEPARATOR = "=" * 92  # the reference's line after each text

Scorer = Callable[[Tensor], tuple[float, int]]
"""``score(tokens_BL) -> (sum of the texts' perplexities, number of texts)``."""


class Snapshots:
    """Hook of the trainer that writes, every ``training.snapshot_freq`` steps and at the end, into the run folder

    * ``snapshots/iter_{step}``: averaged weights, loadable like any exported model;
    * ``checkpoints/checkpoint_{step}.pth`` and ``.hydra/config.yaml`` for the reference, if
      ``training.save_reference_pth``;
    * ``samples/iter_{step}/sample_{rank}.txt``, if ``training.snapshot_sampling``: the texts of every process.

    Args:
        tokenizer: turns samples into text.
        build_scorer: makes the scorer of generative perplexity when first needed; None: texts are not scored.
    """

    at_end = True

    def __init__(
        self, config: TrainConfig, tokenizer: Tokenizer, build_scorer: Callable[[torch.device], Scorer] | None = None
    ) -> None:
        self.config, self.tokenizer, self.build_scorer = config, tokenizer, build_scorer
        self.every_steps = config.training.snapshot_freq
        self.schedule = build_schedule(config.noise.type, config.noise.sigma_min, config.noise.sigma_max)

    def __call__(self, state: TrainState) -> Mapping[str, float] | None:
        training, parallel = self.config.training, state.parallel
        with state.eval_model() as model:
            if state.is_main:
                export(
                    state.run_dir / "snapshots" / f"iter_{state.step}", model.state_dict(), self.config, self.tokenizer
                )
                if training.save_reference_pth:
                    save_reference_files(state.run_dir, model, state.step, self.config, self.schedule)
            if not training.snapshot_sampling:
                return None
            rows = self.config.sampling.batch_size or state.config.batch.micro_size
            first = parallel.rank * rows
            sampled = self.sample(
                model, range(first, first + rows), derive_seed(self.config.seed, "snapshot", state.step)
            )
        self._write_texts(state.run_dir / "samples" / f"iter_{state.step}" / f"sample_{parallel.rank}.txt", sampled)
        calls, count = parallel.sum([float(sampled.calls_B.sum()), float(rows)])
        values = {"snapshot/nfe": calls / count}
        if self.config.eval.perplexity and self.build_scorer is not None:
            values |= self._score(sampled.tokens_BL, state)
        return values

    def sample(self, model: nn.Module, rows: range, seed: int) -> SampleResult:
        """Texts number ``rows`` of this seed, which do not depend on the other processes' texts."""
        sampling, length = self.config.sampling, self.config.model.length
        device = next(model.parameters()).device
        empty_BL = torch.full((len(rows), length), self.config.tokens, dtype=torch.int64, device=device)
        shared = {"mask_id": self.config.tokens, "draw": sampling.token_draw(None), "seed": seed, "rows": rows}

        def denoise(tokens_RL: Tensor, where_RL: Tensor) -> Tensor:
            return model(tokens_RL, where=where_RL)

        if sampling.predictor == "ordered":
            order_BL = build_order("random", length, rows=rows, seed=seed)
            return sample_ordered(denoise, empty_BL, order_BL, **shared)
        if sampling.predictor == "first_hitting":
            return sample_event_driven(denoise, empty_BL, **shared)
        return sample_event_driven(
            denoise, empty_BL, schedule=self.schedule, method=sampling.predictor, steps=sampling.steps, **shared
        )

    def _write_texts(self, path: Path, sampled: SampleResult) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [self.tokenizer.decode(tokens_L) for tokens_L in sampled.tokens_BL]
        path.write_text("".join(f"{text}\n{SEPARATOR}\n" for text in texts), encoding="utf-8")

    def _score(self, tokens_BL: Tensor, state: TrainState) -> dict[str, float]:
        """Mean perplexity of the texts of all processes; empty, with a warning, if the scorer cannot be loaded."""
        try:
            score = self.build_scorer(state.device)
            total, count = score(tokens_BL)
        except DataError as error:
            # A training run does not die of a missing scorer; the texts are on disk and can be scored later.
            if state.is_main:
                logger.warning("texts are not scored: %s Set eval.perplexity=false to silence this.", error)
            self.build_scorer = None
            total, count = 0.0, 0
        total, count = state.parallel.sum([total, float(count)])
        return {"snapshot/generative_perplexity": total / count} if count else {}


def export(folder: Path, weights: Mapping[str, Tensor], config: TrainConfig, tokenizer: Tokenizer) -> Path:
    """Writes a model that ``radd.loading.load_model`` and the reference load: safetensors, nested config.json, card."""
    tokenizer.save(folder)  # first: it may bring a README or config of its own
    return export_weights(folder, weights, asdict(config), model_card(config))


def model_card(config: TrainConfig) -> str:
    """A README for exported weights: what, how trained, from which sources, how to use."""
    origin = collect(seed=config.seed)
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    training = config.training
    return f"""---
license: apache-2.0
pipeline_tag: text-generation
tags: [diffusion, masked-diffusion, radd]
---

# {config.name}

Masked diffusion language model (RADD, arXiv 2406.03736): {config.model.n_blocks} blocks of width
{config.model.hidden_size}, {config.tokens} tokens, trained on {config.model.length}-token blocks of {config.data.train}
for {training.n_iters} steps of {training.batch_size} blocks; loss {training.loss_type}, {config.noise.type} noise.
The weights are {"the last ones" if training.ema is None else f"the moving average (decay {training.ema})"}.

    python -m radd.generate model_path=THIS_FOLDER
    python -m radd.evaluate model_path=THIS_FOLDER valid_dataset=wikitext103 loss_type={training.loss_type}

Tokenizer: {config.data.tokenizer}. Seed {config.seed}, sources {origin["git_revision"]}, {versions}.

The whole configuration:

```json
{json.dumps(asdict(config), indent=1)}
```
"""


def save_reference_files(run_dir: Path, model: RADD, step: int, config: TrainConfig, schedule: Schedule) -> None:
    """Writes ``checkpoints/checkpoint_{step}.pth`` and ``.hydra/config.yaml``, where the reference looks for them.

    It can sample from and evaluate the file, but not continue training: ``model`` holds the averaged weights as well,
    and there is no optimizer state. Our own checkpoints are for that.
    """
    decay = config.training.ema
    path = run_dir / "checkpoints" / f"checkpoint_{step}.pth"
    save_reference_checkpoint(
        path, model.state_dict(), step=step, decay=0.0 if decay is None else decay, overwrite=True
    )
    nested = run_dir / REFERENCE_CONFIG
    nested.parent.mkdir(exist_ok=True)
    nested.write_text(OmegaConf.to_yaml(OmegaConf.create(reference_config(asdict(config), model, schedule))))
