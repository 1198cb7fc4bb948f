"""Commonsense tasks of LoRA and DoRA adapters by EleutherAI's lm-evaluation-harness: originals against generated ones.

The language model is loaded once; adapters are put on and taken off. Scores of single adapters lie in
``adapters.jsonl`` and are used again when the same command is repeated after an interruption.

Source: downstream evaluation of "Recurrent Diffusion for Large-Scale Parameter Generation" (arXiv 2501.11587).
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from common.checkpoint import write_json
from common.config import require_at_least, require_choice
from common.errors import CheckpointError, ConfigError, DataError
from common.evaluation.metric import Metric, mean_metric
from common.provenance import collect
from common.report.page import write_atomically
from common.report.tables import Table, print_tables
from rpg.adapters import is_adapter_folder, read_adapter, read_adapter_config
from rpg.candidates import Network, averaged, from_folder
from rpg.checkpoint_files import write_checkpoint
from rpg.predictions import state_hash

logger = logging.getLogger(__name__)
TASKS = ("boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
BASE, MEAN = "no adapter", "mean of originals"
RECORDS, RESULTS = "adapters.jsonl", "results.json"


@dataclass(frozen=True, kw_only=True)
class CommonsenseConfig:
    """Options of ``python -m rpg.commonsense``."""

    language_model: str  # folder or hub name of the language model that the adapters belong to
    generated: str | None = None  # folder of generated adapters, or one adapter
    originals: str | None = None  # folder of the adapters that the generator was trained on
    tasks: list[str] = field(default_factory=lambda: list(TASKS))  # of the harness, or of include_path
    include_path: str | None = None  # folder with task files of your own
    base: bool = True  # score the language model without an adapter too
    mean: bool = True  # and with the mean of the original adapters
    max_adapters: int | None = None  # so many of each folder, evenly spaced; null: all
    limit: int | None = None  # first so many questions of each task; null: all
    num_fewshot: int | None = None  # solved examples before each question; null: the task's own number
    batch_size: int = 8
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str | None = None  # null: the GPU if there is one
    work_dir: str = "commonsense"
    overwrite: bool = False  # replace the results that are there; records of single adapters are kept and used
    seed: int = 0  # of the examples before questions

    def __post_init__(self) -> None:
        if not (self.generated or self.originals):
            raise ConfigError("there are no adapters to score: give generated=DIR, originals=DIR, or both.")
        if not self.tasks:
            raise ConfigError(f"tasks is empty; give some of {', '.join(TASKS)}.")
        require_choice("precision", self.precision, ("bf16", "fp32"))
        require_at_least("batch_size", self.batch_size, 1)
        for name in ("max_adapters", "limit"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)


def evaluate_adapters(config: CommonsenseConfig) -> dict[str, Any]:
    """Scores every adapter on every task, writes and prints. Returns the values of ``results.json``.

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair.
    """
    folder = Path(config.work_dir)
    if (folder / RESULTS).exists() and not config.overwrite:
        raise ConfigError(f"work_dir={folder} holds {RESULTS} already; use overwrite=true, or choose another folder.")
    groups = collect_adapters(config)
    folder.mkdir(parents=True, exist_ok=True)
    harness = Harness(config)
    known = read_records(folder / RECORDS)
    records = []
    for group, adapters in groups.items():
        for adapter in adapters:
            state = None if group == BASE else adapter.load()
            key = _key(config, state)
            if key not in known:
                template = next((each.path for each in adapters if each.path), None) or _template(groups)
                scores = harness.score(None if state is None else _as_folder(adapter, state, template, harness.scratch))
                known[key] = scores
                lines = [json.dumps({"key": name, "scores": found}) for name, found in known.items()]
                write_atomically(folder / RECORDS, ("\n".join(lines) + "\n").encode())
            records.append({"group": group, "adapter": adapter.name, "scores": known[key]})
            logger.info("%s, %s: %s", group, adapter.name, _line(known[key]))
    values = {"adapters": records, "groups": summarize(records), "config": asdict(config), **collect(seed=config.seed)}
    write_json(folder / RESULTS, values)
    table = adapters_table(values["groups"], config.tasks)
    write_atomically(folder / "commonsense.csv", table.to_csv().encode())
    print_tables([table])
    return values


def collect_adapters(config: CommonsenseConfig) -> dict[str, list[Network]]:
    """Groups of adapters; that of the bare language model holds a placeholder."""
    groups: dict[str, list[Network]] = {BASE: [Network(config.language_model, dict)]} if config.base else {}
    for name in ("originals", "generated"):
        place = getattr(config, name)
        if place is None:
            continue
        path = Path(place)
        if is_adapter_folder(path):
            groups[name] = [Network(path.name, lambda path=path: read_adapter(path), path=path)]
        else:
            groups[name] = from_folder(path, name, limit=config.max_adapters)
        files = [adapter.name for adapter in groups[name] if not adapter.path.is_dir()]
        if files:
            raise DataError(
                f"{name}={place}: {files[0]} is no adapter's folder; generate with format=peft, or give a folder of "
                "adapters."
            )
    if config.mean and len(groups.get("originals", ())) > 1:
        groups[MEAN] = averaged(groups["originals"], MEAN)
    return groups


def _template(groups: Mapping[str, Sequence[Network]]) -> Path:
    return next(each.path for adapters in groups.values() for each in adapters if each.path)


def _as_folder(adapter: Network, state: Mapping[str, torch.Tensor], template: Path, scratch: Path) -> Path:
    """The adapter as today's ``peft`` reads it, whatever names its file has."""
    config = read_adapter_config(adapter.path or template)
    return write_checkpoint(scratch / "adapter", state, "peft", overwrite=True, adapter_config=config)


def _key(config: CommonsenseConfig, state: Mapping[str, torch.Tensor] | None) -> str:
    """What decides an adapter's scores."""
    facts = {
        name: getattr(config, name) for name in ("language_model", "tasks", "limit", "num_fewshot", "precision", "seed")
    }
    text = json.dumps([facts, None if state is None else state_hash(state)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Scores by key of an earlier, perhaps interrupted, evaluation.

    Raises: DataError for a damaged line.
    """
    found = {}
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            record = json.loads(line)
            found[record["key"]] = record["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is damaged ({error}); delete the line.") from None
    return found


def find_tasks(names: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks: of your own alone if these are all, because its thousands take many seconds.

    Raises: ConfigError for a task that does not exist.
    """
    from lm_eval.tasks import TaskManager

    for with_defaults in (False, True) if include_path else (True,):
        tasks = TaskManager(include_path=include_path, include_defaults=with_defaults)
        unknown = [name for name in names if not tasks.match_tasks([name])]
        if not unknown:
            return tasks
    raise ConfigError(
        f"tasks: {unknown[0]!r} is no task of the harness; `lm-eval ls tasks` lists them, include_path=DIR adds your "
        "own."
    )


class Harness:
    """A language model in lm-evaluation-harness that adapters are put on.

    Raises: DataError if the model or a task's data cannot be loaded; ConfigError for a task that does not exist.
    """

    def __init__(self, config: CommonsenseConfig) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.config = config
        self.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._scratch = tempfile.TemporaryDirectory(prefix="rpg-commonsense-")
        self.scratch = Path(self._scratch.name)
        # what fails fast comes first, and the large weights last
        self._tokenizer = self._load(AutoTokenizer)
        self._tasks = find_tasks(config.tasks, config.include_path)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self._base = self._load(AutoModelForCausalLM, dtype=dtype, use_safetensors=True).to(self.device).eval()

    def _load(self, kind: Any, **options: Any) -> Any:
        name = self.config.language_model
        try:
            return kind.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise DataError(
                f"language_model={name} cannot be loaded ({str(error).strip().splitlines()[0]}); give a folder of the "
                "transformers library with config.json, model.safetensors and a tokenizer, or a name on the hub."
            ) from None

    def score(self, adapter: Path | None) -> dict[str, dict[str, float | None]]:
        """``{task: {"metric", "value", "standard_error"}}`` of an adapter's folder, or of the bare model.

        Raises: CheckpointError if the adapter does not fit the model.
        """
        if adapter is None:
            return self._run(self._base)
        from peft import PeftModel

        try:
            adapted = PeftModel.from_pretrained(self._base, adapter)
        except (RuntimeError, ValueError, KeyError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"the adapter does not fit language_model={self.config.language_model}: {first}"
            ) from None
        try:
            return self._run(adapted.eval())
        finally:
            self._base = adapted.unload()

    def _run(self, model: nn.Module) -> dict[str, dict[str, float | None]]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        config = self.config
        # the harness seeds the global generators
        with torch.random.fork_rng(devices=[]):
            try:
                found = simple_evaluate(
                    model=HFLM(
                        pretrained=model, tokenizer=self._tokenizer, batch_size=config.batch_size, device=self.device
                    ),
                    tasks=list(config.tasks),
                    num_fewshot=config.num_fewshot,
                    limit=config.limit,
                    task_manager=self._tasks,
                    bootstrap_iters=0,
                    log_samples=False,
                    random_seed=config.seed,
                    numpy_random_seed=config.seed,
                    torch_random_seed=config.seed,
                    fewshot_random_seed=config.seed,
                )
            except (ConnectionError, FileNotFoundError) as error:
                raise DataError(
                    f"the data of a task cannot be loaded ({str(error).strip().splitlines()[0]}); run once with a "
                    "network connection, or give local tasks by include_path=DIR."
                ) from None
        return {name: _score_of(found["results"][name]) for name in config.tasks}


def _score_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy (by length where the task has it, as published tables do) and its error over questions."""
    for metric in ("acc_norm,none", "acc,none"):
        if metric in result:
            error = result.get(metric.replace(",", "_stderr,"))
            return {
                "metric": metric.split(",")[0],
                "value": float(result[metric]),
                "standard_error": float(error) if isinstance(error, int | float) else None,
            }
    raise ConfigError(f"tasks: {result.get('alias', 'a task')} has no accuracy; choose tasks with acc or acc_norm.")


def _line(scores: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{task} {found['value']:.4f}" for task, found in scores.items())


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """group -> task (and ``mean``) -> mean and standard error: over adapters, of a single one over questions."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record["scores"])
    found = {}
    for group, scores in groups.items():
        by_task = {}
        for task in scores[0]:
            metric = mean_metric(task, [each[task]["value"] for each in scores])
            if len(scores) == 1:
                metric = Metric(task, metric.value, scores[0][task]["standard_error"])
            by_task[task] = {"value": metric.value, "standard_error": metric.standard_error, "adapters": len(scores)}
        mean = mean_metric("mean", [sum(each[task]["value"] for task in each) / len(each) for each in scores])
        by_task["mean"] = {"value": mean.value, "standard_error": mean.standard_error, "adapters": len(scores)}
        found[group] = by_task
    return found


def adapters_table(groups: Mapping[str, Mapping[str, Mapping[str, Any]]], tasks: Sequence[str]) -> Table:
    """A row per group, two columns per task."""
    names = [*tasks, "mean"]
    rows = [
        [group, found["mean"]["adapters"], *(cell for name in names for cell in
                                             (found[name]["value"], found[name]["standard_error"]))]
        for group, found in groups.items()
    ]  # fmt: skip
    columns = ["adapters", "number", *(column for name in names for column in (name, f"s.e. {name}"))]
    caption = "Accuracy; errors over adapters, of a single adapter over questions."
    return Table(name="commonsense", columns=columns, rows=rows, caption=caption)
