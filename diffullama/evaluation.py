"""What ``python -m diffullama.evaluate`` does: tasks on a model, as a diffusion model or as its autoregressive parent.

Into ``work_dir`` go ``results_<mode>.json`` (numbers with standard errors, options, seed, revision), one jsonl file of
items for each task, and the partial results that let an interrupted evaluation continue. Neither the batch size nor the
number of processes changes a result.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from common.checkpoint import write_json
from common.config import PRECISIONS, require_at_least, require_choice
from common.data.fingerprint import text_fingerprint
from common.errors import ConfigError, DataError
from common.evaluation.metric import Metric
from common.evaluation.partial_results import PartialResults, weights_digest
from common.parallel import Parallel
from common.precision import autocast_forward, resolve_precision
from common.provenance import collect
from common.report.tables import Table, print_tables
from diffullama.attention import require_bidirectional
from diffullama.loading import load_model, warn_unless_adapted
from diffullama.sandbox import Limits
from diffullama.scoring import ScoringRule
from diffullama.tasks.choice import CHOICE_TASKS, ChoiceEvaluation
from diffullama.tasks.context import Context, Evaluation, Outcome
from diffullama.tasks.corpus import BoundEvaluation, BoundOptions, SpanEvaluation
from diffullama.tasks.dataset import load_rows
from diffullama.tasks.programs import ProgramEvaluation
from diffullama.tasks.samples import SampleEvaluation, SampleOptions
from diffullama.tasks.text import TEXT_TASKS, FillOptions, TextEvaluation

DATA_TASKS = {**{name: task.source for name, task in CHOICE_TASKS.items()},
              **{name: task.source for name, task in TEXT_TASKS.items()}}  # fmt: skip
TASKS = (*DATA_TASKS, "nelbo", "infill_nll", "gen_ppl")
MODES = ("diffusion", "causal")
BOS = ("auto", "always")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PerTask:
    """A text for each task with a data set; null: as published."""

    hellaswag: str | None = None
    winogrande: str | None = None
    piqa: str | None = None
    siqa: str | None = None
    lambada: str | None = None
    triviaqa: str | None = None
    squad: str | None = None
    rocstories: str | None = None
    gsm8k: str | None = None
    humaneval_infill: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProgramOptions:
    """How the programs of ``humaneval_infill`` are run, see ``diffullama/sandbox.py``."""

    execute: bool = True  # false: only compares lines and writes the file for the official scorer
    seconds: float = 5.0  # wall-clock time of one program
    memory_mb: int = 512  # address space of one program

    def __post_init__(self) -> None:
        self.limits()

    def limits(self) -> Limits | None:
        """None if no code is to be run."""
        limits = Limits(seconds=self.seconds, memory_mb=self.memory_mb)
        return limits if self.execute else None


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of ``python -m diffullama.evaluate``."""

    model_path: str  # run folder, exported folder, adapter folder, or hub name
    tasks: list[str] = field(default_factory=lambda: ["hellaswag", "winogrande", "piqa", "siqa"])
    mode: Literal["diffusion", "causal"] = "diffusion"  # causal: the autoregressive baseline
    work_dir: str = "evaluation"  # results, items, partial results
    data: PerTask = field(default_factory=PerTask)  # local file or folder, or another hub name
    split: PerTask = field(default_factory=PerTask)  # of the data set
    limit: int | None = None  # first items (blocks, samples) of each task; null: as published
    seed: int = 0
    batch_size: int = 64  # network rows per forward pass; does not change a result
    group_size: int = 16  # items that are computed and kept on disk together
    device: str | None = None  # null: this process's GPU, else the CPU
    ema: bool = True  # averaged weights, where a run kept them
    base: str | None = None  # base model of an adapter; null: the one it names
    tokenizer: str | None = None  # null: the one stored with the model
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    attn_implementation: str | None = None  # sdpa, eager or flash_attention_2; null: the library's choice
    mask_token_id: int | None = None  # null: what was stored with the model
    shift: bool | None = None  # null: what was stored with the model
    max_length: int | None = None  # tokens of a sequence at most; null: the model's
    bos: Literal["auto", "always"] = "auto"  # before every text: what its tokenizer adds, or always a BOS token
    progress: bool = True
    cache_dir: str = "data"  # downloads
    scoring: ScoringRule = field(default_factory=ScoringRule)  # hellaswag, winogrande, piqa, siqa
    fill: FillOptions = field(default_factory=FillOptions)  # lambada, triviaqa, squad, rocstories, gsm8k, humaneval
    nelbo: BoundOptions = field(default_factory=BoundOptions)  # nelbo, infill_nll
    gen_ppl: SampleOptions = field(default_factory=SampleOptions)
    humaneval: ProgramOptions = field(default_factory=ProgramOptions)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError(f"tasks is empty; give some of {', '.join(TASKS)}.")
        for name in self.tasks:
            require_choice("tasks", name, TASKS)
        require_choice("mode", self.mode, MODES)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("bos", self.bos, BOS)
        if self.precision == "fp32" and "flash" in (self.attn_implementation or ""):
            raise ConfigError(
                f"attn_implementation={self.attn_implementation} takes half precision only; add precision=bf16."
            )
        for name in ("batch_size", "group_size", "limit", "max_length"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        require_at_least("seed", self.seed, 0)
        if not self.work_dir:
            raise ConfigError("work_dir is empty; give a folder for the results.")
        if self.mode == "causal" and "infill_nll" in self.tasks:
            raise ConfigError("tasks: infill_nll needs mode=diffusion; causal attention never sees what follows.")


def evaluate(config: EvaluateConfig, parallel: Parallel) -> dict[str, Any]:
    """Runs the tasks; the main process writes and prints. Returns what the JSON file holds. Collective.

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair; data are read before the model.
    """
    if config.device:
        parallel = replace(parallel, device=torch.device(config.device))
    rows = {name: _rows(config, name) for name in dict.fromkeys(config.tasks) if name in DATA_TASKS}
    context, identity = load_context(config, parallel)
    results: dict[str, Any] = {}
    tables = []
    for name in dict.fromkeys(config.tasks):
        task = build_evaluation(name, rows.get(name), context, config)
        began = time.perf_counter()
        outcome = run_task(name, task, config, parallel, identity | {"data": _digest(rows.get(name))})
        results[name] = _as_dict(outcome) | {"seconds": round(time.perf_counter() - began, 3)}
        tables += [[name, *row] for row in _table_rows(outcome)]
        if parallel.is_main:
            _write_items(Path(config.work_dir), name, config.mode, outcome)
    found = {"mode": config.mode, "tasks": results, "processes": parallel.world_size, "config": asdict(config)}
    found |= collect(seed=config.seed)
    if parallel.is_main:
        write_json(Path(config.work_dir) / f"results_{config.mode}.json", found)
        columns = ["task", "metric", "value", "standard error", "items"]
        caption = f"{config.model_path}, {config.mode} mode; accuracies, F1 and ROUGE in percent"
        print_tables([Table(name="results", columns=columns, rows=tables, caption=caption)])
        for name, result in results.items():
            for note in result["notes"]:
                print(f"{name}: {note}", flush=True)
    return found


# ---------------------------------------------------------------- the model and the tasks


def load_context(config: EvaluateConfig, parallel: Parallel) -> tuple[Context, dict[str, Any]]:
    """The model ready for the tasks, and what identifies its numbers in partial results.

    Raises: CheckpointError or ConfigError for a model that cannot be loaded, or stays causal in diffusion mode.
    """
    loaded = load_model(
        config.model_path,
        parallel.device,
        attn_implementation=config.attn_implementation,
        mask_token_id=config.mask_token_id,
        shift=config.shift,
        causal_parent=config.mode == "causal",
        base=config.base,
        tokenizer=config.tokenizer,
        ema=config.ema,
    )
    if config.mode == "diffusion" and parallel.is_main:
        warn_unless_adapted(loaded)
    model = loaded.model.eval()
    require_bidirectional(model, model.vocab_size)
    precision = resolve_precision(config.precision, parallel.device)
    autocast_forward(model, precision, parallel.device)
    limits = [config.max_length, loaded.length]
    context = Context(
        model=model,
        tokenizer=loaded.require_tokenizer(),
        special=loaded.special,
        causal=config.mode == "causal",
        max_length=min(limit for limit in (*limits, 1 << 30) if limit),
        bos=config.bos,
        precision=precision,
        seed=config.seed,
        batch_size=config.batch_size,
        group_size=config.group_size,
        cache_dir=config.cache_dir,
    )
    identity = {
        "weights": parallel.from_main(weights_digest(model) if parallel.is_main else None),
        "tokenizer": context.tokenizer.fingerprint(),
        "special": asdict(loaded.special),
        "mask": model.mask_id,
        "shift": model.shift,
        "mode": config.mode,
        "precision": precision,
        "seed": config.seed,
        "group_size": config.group_size,
        "max_length": context.max_length,
        "bos": config.bos,
    }
    return context, identity


def build_evaluation(name: str, rows: Sequence[Mapping] | None, context: Context, config: EvaluateConfig) -> Evaluation:
    """The task of that name on the model."""
    if name in CHOICE_TASKS:
        return ChoiceEvaluation(CHOICE_TASKS[name], rows, context, config.scoring)
    if name == "humaneval_infill":
        return ProgramEvaluation(rows, context, config.fill, config.humaneval.limits())
    if name in TEXT_TASKS:
        return TextEvaluation(TEXT_TASKS[name], rows, context, config.fill)
    if name == "nelbo":
        return BoundEvaluation(context, config.nelbo, config.limit)
    if name == "infill_nll":
        return SpanEvaluation(context, config.nelbo, config.limit)
    return SampleEvaluation(context, config.gen_ppl, config.limit)


def run_task(
    name: str, task: Evaluation, config: EvaluateConfig, parallel: Parallel, identity: Mapping[str, Any]
) -> Outcome:
    """All groups of a task, shared out over processes; groups that an earlier run has finished are not repeated."""
    settings = {**identity, "task": name, "settings": task.settings}
    partial = PartialResults(Path(config.work_dir) / "partial", f"{name}_{config.mode}", settings, parallel)
    todo = partial.pending(task.num_groups)
    if partial.num_found and parallel.is_main:
        logger.info("%s: %d of %d groups were done before", name, partial.num_found, task.num_groups)
    hide = None if config.progress and parallel.is_main else True
    with tqdm(todo, desc=name, unit="group", disable=hide, leave=False) as bar:
        for group in bar:
            partial.append(group, task.run(group))
    records = partial.collect()
    return task.summary([records[group] for group in range(task.num_groups)])


def _rows(config: EvaluateConfig, name: str) -> list[dict[str, Any]]:
    rows = load_rows(
        name,
        DATA_TASKS[name],
        place=getattr(config.data, name),
        split=getattr(config.split, name),
        cache_dir=config.cache_dir,
    )
    own = TEXT_TASKS[name].limit if name in TEXT_TASKS else None
    return rows[: config.limit or own]


def _digest(rows: Sequence[Mapping] | None) -> str:
    """Of a data set's rows; tasks without one name their text in their settings."""
    return "" if rows is None else text_fingerprint(json.dumps(rows, sort_keys=True, default=str))


# ---------------------------------------------------------------- output


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    metrics = {m.name: {"value": m.value, "standard_error": m.standard_error} for m in outcome.metrics}
    return {"metrics": metrics, **outcome.facts, "notes": outcome.notes}


def _table_rows(outcome: Outcome) -> list[list[Any]]:
    count = next(iter(outcome.facts.values()), len(outcome.items))
    return [[metric.name, metric.value, _error(metric), count] for metric in outcome.metrics]


def _error(metric: Metric) -> float | None:
    return metric.standard_error


def _write_items(folder: Path, name: str, mode: str, outcome: Outcome) -> None:
    files = {f"{name}_{mode}.jsonl": outcome.items}
    files |= {f"{name}_{mode}_{suffix}.jsonl": records for suffix, records in outcome.exports.items()}
    for file, records in files.items():
        try:
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (folder / file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"work_dir={folder}: {file} cannot be written ({error.strerror}); choose another folder."
            ) from None
