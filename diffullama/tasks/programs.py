"""HumanEval with one line missing: the text task, and running the filled programs in the sandbox."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import DataError
from common.evaluation.metric import mean_metric
from diffullama.sandbox import Limits, isolation, run_program
from diffullama.tasks.context import Context, Outcome
from diffullama.tasks.dataset import Row
from diffullama.tasks.text import TEXT_TASKS, FillOptions, TextEvaluation

SAMPLES = "samples"  # suffix of the file that the official scorer reads


class ProgramEvaluation(TextEvaluation):
    """Fills a line of each program and runs the problem's tests; an ``Evaluation``.

    Args:
        limits: of each program; None: no code is executed, only the lines are compared and written.

    Source: specification 6.2; pass@1 as the official scorer of the benchmark defines it, with one sample a problem.
    """

    def __init__(self, rows: Sequence[Row], context: Context, options: FillOptions, limits: Limits | None) -> None:
        super().__init__(TEXT_TASKS["humaneval_infill"], rows, context, options)
        self.limits = limits
        self.settings |= {"limits": str(limits)}
        if limits is not None and not isolation():
            raise DataError(
                "the sandbox that executes programs cannot start here; set humaneval.execute=false to compare lines "
                "and write the file for the official scorer only."
            )

    def _record(self, number: int, prediction: str, calls: int) -> dict[str, Any]:
        record = super()._record(number, prediction, calls)
        if self.limits is None:
            return record
        verdict = run_program(program(self.rows[number], prediction), self.limits)
        record["metrics"] = {"pass@1": 100.0 * verdict.passed, **record["metrics"]}
        return record | {"outcome": verdict.outcome, "message": verdict.message}

    def summary(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        outcome = super().summary(records)
        samples = [{"task_id": item["task_id"], "completion": item["pred"]} for item in outcome.items]
        notes = [*outcome.notes]
        if self.limits is None:
            notes.append(f"no code was executed; give the {SAMPLES} file to the official scorer, in a sandbox")
        else:
            notes.append(f"programs ran with {', '.join(isolation())}")
            late = mean_metric("timed_out", [100.0 * (item["outcome"] == "timed out") for item in outcome.items])
            outcome.metrics.append(late)
        return Outcome(outcome.metrics, outcome.items, outcome.facts, notes, {SAMPLES: samples})


def program(row: Row, line: str) -> str:
    """The completed program followed by its tests, as the official scorer joins them."""
    return f"{row['prompt']}{line}{row['suffix']}\n{row['test']}\ncheck({row['entry_point']})\n"
