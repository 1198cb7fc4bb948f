"""What ``python -m radd.evaluate`` does: zero-shot perplexity, or generative perplexity of samples.

Results go to ``work_dir``: the reference's log file, a JSON file with numbers, options, seed and sources, and the
partial results that let an interrupted evaluation continue.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from common.checkpoint import write_json
from common.config import PRECISIONS, require_at_least, require_choice
from common.data.corpora import build_text_dataset
from common.data.tokenizer import load_tokenizer
from common.errors import ConfigError, DataError
from common.evaluation.diversity import diversity
from common.evaluation.generative_perplexity import DEFAULT_SCORER, GenerativePerplexity, Scorer, load_scorer, score
from common.evaluation.metric import Metric
from common.evaluation.samples import Sample, read_samples
from common.parallel import Parallel
from common.precision import autocast_forward, resolve_precision
from common.provenance import collect
from radd.loading import load_model
from radd.losses import LOSS_TYPES, ORDERED
from radd.perplexity import ESTIMATORS, REFERENCE_DRAWS, LossEstimator, evaluate_perplexity

TASKS = ("perplexity", "generative_perplexity")
LOW_VARIANCE_DRAWS = 256  # a quarter of the reference's
RULE = "=" * 32


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of ``python -m radd.evaluate``; names and defaults of the reference's script where it has them."""

    task: Literal["perplexity", "generative_perplexity"] = "perplexity"
    work_dir: str = "logs"  # log, results as JSON, partial results
    batch_size: int = 16  # network rows per forward pass; does not change a result
    seed: int = 0
    ngpus: int | None = None  # number of processes this evaluation expects; null: as many as were started
    device: str | None = None  # null: this process's GPU, else the CPU
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"  # of the network; the reference has fp16
    progress: bool = True  # progress bar of the main process, on stderr
    cache_dir: str = "data"  # downloads and token caches
    max_samples: int | None = None  # score the first so many blocks (or samples); null: all

    model_path: str | None = None  # run folder, exported folder, the reference's .pth, or hub name
    ema: bool = True  # averaged weights, where the model has both
    valid_dataset: str = "ptb"  # embedded, a known corpus, a hub id, a path, or name=path/*.txt|jsonl|parquet
    split: str | None = None  # null: the reference's choice: test, but train for wikitext2
    length: int | None = None  # tokens per block; null: the model's training length
    tokenizer: str | None = None  # null: the model's
    group_size: int | None = None  # documents packed together, dropping each group's tail; 1000 is the reference
    loss_type: Literal["t_DSE", "t_DCE", "lambda_DCE", "k_DCE", "ar_forward", "ar_backward", "ar_random"] = "lambda_DCE"
    estimator: Literal["reference", "low_variance"] = "reference"
    monte_carlo_timesteps: int | None = None  # draws; null: 1024 (reference), 256 (low_variance), 1 (ar_*)
    sampling_eps: float = 1e-3  # t losses: smallest time drawn
    exact_range: bool = False  # t losses: also cover the masking levels that the reference leaves out

    samples: str | None = None  # generative_perplexity: the .jsonl file of radd.generate
    scorer: str = DEFAULT_SCORER  # generative_perplexity: causal language model, local folder or hub name
    retokenise: bool = False  # generative_perplexity: score the text in the scorer's own tokens

    def __post_init__(self) -> None:
        require_choice("task", self.task, TASKS)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("loss_type", self.loss_type, (*LOSS_TYPES, *ORDERED))
        require_choice("estimator", self.estimator, ESTIMATORS)
        require_at_least("batch_size", self.batch_size, 1)
        for name in ("ngpus", "length", "group_size", "max_samples", "monte_carlo_timesteps"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        if not self.work_dir:
            raise ConfigError("work_dir is empty; give a folder for the log and the results.")
        if self.task == "perplexity" and not self.model_path:
            raise ConfigError("model_path has no value; give a run folder, an exported folder, a .pth or a hub name.")
        if self.task == "generative_perplexity" and not self.samples:
            raise ConfigError("samples has no value; give the .jsonl file that radd.generate wrote (output=...).")

    @property
    def draws(self) -> int:
        """Evaluations per sequence."""
        if self.monte_carlo_timesteps is not None:
            return self.monte_carlo_timesteps
        if self.loss_type in ORDERED:
            return 1
        return LOW_VARIANCE_DRAWS if self.estimator == "low_variance" else REFERENCE_DRAWS

    @property
    def data_split(self) -> str:
        """The split that is scored."""
        if self.split is not None:
            return self.split
        return "train" if self.valid_dataset == "wikitext2" else "test"

    def check_processes(self, world_size: int) -> None:
        """Raises ConfigError unless as many processes run as ``ngpus`` says."""
        if self.ngpus is not None and self.ngpus != world_size:
            raise ConfigError(
                f"ngpus={self.ngpus} does not fit the {world_size} process{'' if world_size == 1 else 'es'} started; "
                f"launch `torchrun --nproc-per-node {self.ngpus} -m radd.evaluate ...` or leave ngpus out."
            )


def safe_name(text: str) -> str:
    """A data set's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_")


def evaluate(config: EvaluateConfig, parallel: Parallel) -> dict[str, Any]:
    """Runs the task; the main process writes log and JSON. Returns what the JSON file holds (on every process).

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair.
    """
    config.check_processes(parallel.world_size)
    if config.device:
        parallel = Parallel(
            parallel.rank, parallel.world_size, parallel.local_rank, torch.device(config.device), parallel.plan
        )
    return zero_shot(config, parallel) if config.task == "perplexity" else generative(config, parallel)


# ---------------------------------------------------------------- zero-shot perplexity


def zero_shot(config: EvaluateConfig, parallel: Parallel) -> dict[str, Any]:
    """Perplexity of a corpus, see ``radd/perplexity.py``."""
    loaded = load_model(config.model_path, parallel.device, ema=config.ema)
    estimator = LossEstimator(
        loss_type=config.loss_type,
        estimator=config.estimator,
        draws=config.draws,
        schedule=loaded.schedule,
        sampling_eps=config.sampling_eps,
        exact_range=config.exact_range,
        seed=config.seed,
    )
    if config.tokenizer is not None:
        loaded.tokenizer_source = config.tokenizer
    dataset = build_text_dataset(
        config.valid_dataset,
        config.data_split,
        length=config.length or loaded.model.config.length,
        tokenizer=loaded.load_tokenizer(),
        cache_dir=config.cache_dir,
        group_size=config.group_size,
        progress=config.progress and parallel.is_main,
    )
    precision = resolve_precision(config.precision, parallel.device)
    autocast_forward(loaded.model, precision, parallel.device)
    name = f"zero_shot_on_{safe_name(config.valid_dataset)}_{config.loss_type}"
    log = Log(config.work_dir, f"{name}_logs", parallel.is_main)
    log.options(config, parallel)
    result = evaluate_perplexity(
        loaded.model,
        dataset,
        estimator,
        batch_size=config.batch_size,
        parallel=parallel,
        work_dir=config.work_dir,
        name=name,
        max_samples=config.max_samples,
        source=precision,
        progress=config.progress,
    )
    log(RULE)
    log(f"Evaluation PPL: {result.bound.perplexity.value}")
    for line in result.lines():
        log(line)
    log(RULE)
    suffix = "" if config.estimator == "reference" or config.loss_type in ORDERED else f"_{config.estimator}"
    return _finish(config, parallel, f"{name}{suffix}.json", result.as_dict() | {"documents": dataset.info.documents})


# ---------------------------------------------------------------- generative perplexity


def generative(config: EvaluateConfig, parallel: Parallel) -> dict[str, Any]:
    """Scores of samples under a causal language model, shared out over processes, and how varied they are."""
    samples = read_samples(config.samples, limit=config.max_samples)
    scorer = load_scorer(config.scorer, parallel.device)
    autocast_forward(scorer.model, resolve_precision(config.precision, parallel.device), parallel.device)
    log = Log(config.work_dir, "generative_perplexity_logs", parallel.is_main)
    log.options(config, parallel)
    scored = retokenised(samples, scorer) if config.retokenise else [sample.tokens for sample in samples]
    tokens = [sample.tokens for sample in samples] if all(sample.tokens for sample in samples) else scored
    mine = range(parallel.rank, len(scored), parallel.world_size)
    nll = score(scorer, scored, batch_size=config.batch_size, chosen=mine)
    everyones = {index: value for part in parallel.gather(nll) for index, value in part.items()}
    scores = GenerativePerplexity([everyones[i] for i in range(len(scored))], [len(ids) - 1 for ids in scored])
    metrics = [*scores.metrics(), *diversity(tokens)]
    log(RULE)
    for metric in metrics:
        log(f"{LABELS.get(metric.name, metric.name)}: {metric.value:.6g}{_error(metric)}")
    counts = {"samples": len(samples), "scored_tokens": sum(scores.count)}
    log(f"Samples: {counts['samples']}; scored tokens: {counts['scored_tokens']}; scorer: {scorer.name}")
    log(RULE)
    values = {metric.name: metric.value for metric in metrics}
    values |= {f"{metric.name}_error": metric.standard_error for metric in metrics if metric.standard_error is not None}
    name = f"generative_perplexity_{safe_name(Path(config.samples).stem)}.json"
    return _finish(config, parallel, name, values | counts)


LABELS = {
    "perplexity": "Generative PPL (mean over sequences, as the reference)",
    "perplexity_pooled": "Generative PPL (pooled over tokens)",
    "unigram_entropy": "Unigram entropy (nats)",
}


def _error(metric: Metric) -> str:
    return "" if metric.standard_error is None else f" +- {metric.standard_error:.3g} over sequences"


def retokenised(samples: Sequence[Sample], scorer: Scorer) -> list[list[int]]:
    """The texts in the scorer's own tokens.

    Raises: DataError if a sample has no text or the scorer no tokenizer.
    """
    tokenizer = load_tokenizer(scorer.name)
    missing = [index for index, sample in enumerate(samples) if sample.text is None]
    if missing:
        raise DataError(
            f"retokenise=true needs texts, but sample {missing[0]} has none; generate with a tokenizer, or "
            "retokenise=false."
        )
    return [ids[: scorer.max_length] for ids in tokenizer.encode_batch([sample.text for sample in samples])]


# ---------------------------------------------------------------- output


class Log:
    """Lines on stdout and, as the reference does, in a file of ``work_dir``; the main process only.

    Raises: DataError if the file cannot be written.
    """

    def __init__(self, work_dir: str, name: str, is_main: bool) -> None:
        self._path = Path(work_dir) / name
        self._is_main = is_main
        if not is_main:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("a").close()
        except OSError as error:
            raise DataError(
                f"work_dir={work_dir}: {self._path} cannot be written ({error.strerror}); choose another folder."
            ) from None

    def __call__(self, line: str) -> None:
        if self._is_main:
            print(line, flush=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{_timestamp()} - {line}\n")

    def options(self, config: EvaluateConfig, parallel: Parallel) -> None:
        """What is evaluated, one option per line, into the file only."""
        if self._is_main:
            with self._path.open("a", encoding="utf-8") as file:
                lines = [RULE, f"device: {parallel.device}", f"processes: {parallel.world_size}"]
                lines += [f"{key}: {value}" for key, value in asdict(config).items()]
                file.writelines(f"{_timestamp()} - {line}\n" for line in lines)


def _timestamp() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _finish(config: EvaluateConfig, parallel: Parallel, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Adds where the numbers come from and writes them."""
    outcome = values | {"processes": parallel.world_size, "config": asdict(config), **collect(seed=config.seed)}
    if parallel.is_main:
        write_json(Path(config.work_dir) / name, outcome)
    return outcome
