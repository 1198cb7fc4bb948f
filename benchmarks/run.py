"""Runs the benchmarks and keeps their results in RESULTS.md.

    python -m benchmarks.run                          all of them
    python -m benchmarks.run radd_sampling            some of them
    python -m benchmarks.run --list                   what there is
    python -m benchmarks.run --results mine.md        leave the repository's table alone

A benchmark is a file of this folder with a function ``measure() -> dict``; one whose ``measure`` needs arguments is run
as a script with ``--json FILE`` instead. Each runs in a process of its own, so that the peak memory and the caches of
one do not enter the next. Numbers, texts and truth values of the result become rows; a nested mapping becomes rows
named ``outer / inner``, a mapping of mappings with equal keys a table. ``checks`` may hold ``{"claim", "measured",
"threshold", "passed"}`` mappings, ``ratios`` ``{"name", "ratio", "target"}`` ones with the least ratio wanted. Each
section of RESULTS.md belongs to one benchmark on one kind of device and is replaced as a whole; the rest of the file
stays. Exit code 1: a benchmark failed or missed a threshold.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.provenance import library_versions
from common.report.command import exit_code
from common.report.page import write_atomically
from common.report.provenance import hardware, revision, today, usable_cores
from common.report.tables import Check, Table, checks_table, format_number, print_tables

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "RESULTS.md"
TITLE = """# Benchmarks

Written by `python -m benchmarks.run`; times are medians of interleaved runs, ratios are of one run.
"""
CHECKS, RATIOS = "checks", "ratios"


@dataclass(frozen=True)
class Benchmark:
    """A file with a ``measure`` function.

    Attributes:
        summary: the first paragraph of its docstring.
        is_script: its ``measure`` needs arguments, which only its own command line can make.
    """

    name: str
    path: Path
    summary: str
    is_script: bool = False


def discover(folder: Path = FOLDER) -> list[Benchmark]:
    """Every benchmark of the folder by name, read from the sources: nothing is imported."""
    found = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "measure":
                summary = (ast.get_docstring(tree) or path.stem).split("\n\n")[0].replace("\n", " ")
                needed = len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)
                found.append(Benchmark(path.stem, path, summary, is_script=needed > 0))
    return found


def select(benchmarks: Sequence[Benchmark], names: Sequence[str]) -> list[Benchmark]:
    """The named ones, or all.

    Raises: ConfigError for a name that is not there.
    """
    known = {benchmark.name: benchmark for benchmark in benchmarks}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"benchmark {unknown[0]!r} is not known; choose of {', '.join(known) or 'none'}.")
    return [known[name] for name in names] if names else list(benchmarks)


def load(path: Path) -> Callable[[], dict]:
    """The file's ``measure``; files of this folder are imported by name, so that their processes can be spawned."""
    if path.parent == FOLDER:
        return importlib.import_module(f"benchmarks.{path.stem}").measure
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.measure


def run_child(path: Path, result: Path) -> int:
    """Body of a benchmark's process: measures and leaves the result as JSON."""
    measured = load(path)()
    if not isinstance(measured, Mapping):
        raise ConfigError(f"{path.name}: measure() returned {type(measured).__name__}; a dict is needed.")
    result.write_text(json.dumps(measured, default=float))
    return 0


def run_benchmark(benchmark: Benchmark, *, threads: int, timeout_seconds: float) -> tuple[dict | None, str, float]:
    """Runs one benchmark in its own process.

    Returns: its result (None if it failed), the reason of the failure, the seconds it took.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.run", "--child", str(benchmark.path), str(result)]
        if benchmark.is_script:
            command = [sys.executable, str(benchmark.path), "--json", str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment.setdefault("HF_HUB_OFFLINE", "1")
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        began = time.monotonic()
        try:
            code = subprocess.run(command, cwd=FOLDER.parent, env=environment, timeout=timeout_seconds).returncode
        except subprocess.TimeoutExpired:
            return None, f"took longer than {timeout_seconds:.0f} s", time.monotonic() - began
        seconds = time.monotonic() - began
        if code or not result.exists():
            return None, f"ended with code {code}", seconds
        return json.loads(result.read_text()), "", seconds


def tables(measured: Mapping) -> list[Table]:
    """The result as tables: single values together, every mapping of equal mappings on its own."""
    rows: list[list] = []
    found: list[Table] = []
    for name, value in measured.items():
        if name in (CHECKS, RATIOS, "benchmark"):
            continue
        inner = list(value.values()) if isinstance(value, Mapping) else []
        if inner and all(isinstance(entry, Mapping) and entry.keys() == inner[0].keys() for entry in inner):
            columns = [str(name), *map(str, inner[0])]
            found.append(Table(name=str(name), columns=columns, rows=[[k, *v.values()] for k, v in value.items()]))
        elif isinstance(value, Mapping):
            rows += [[f"{name} / {key}", entry] for key, entry in value.items()]
        else:
            rows.append([str(name), value])
    rows = [[name, ", ".join(map(format_number, v)) if isinstance(v, list) else v] for name, v in rows]
    return ([Table(name="values", columns=["quantity", "value"], rows=rows)] if rows else []) + found


def result_checks(measured: Mapping) -> list[Check]:
    """The thresholds that the benchmark judged."""
    checks = []
    for entry in measured.get(CHECKS, []):
        texts = {key: format_number(entry[key]) for key in ("claim", "measured", "threshold")}
        checks.append(Check(**texts, passed=bool(entry["passed"])))
    for entry in measured.get(RATIOS, []):
        ratio, target = float(entry["ratio"]), float(entry["target"])
        checks.append(
            Check(claim=entry["name"], measured=f"{ratio:.2f}x", threshold=f">= {target:g}x", passed=ratio >= target)
        )
    return checks


def device_kind(facts: Mapping[str, str]) -> str:
    """What a section's numbers hold for: the accelerator, or "CPU"."""
    return facts["gpu"] if facts.get("gpu", "none") != "none" else "CPU"


def section(benchmark: Benchmark, measured: Mapping, *, threads: int, seconds: float) -> tuple[str, str]:
    """Key and Markdown text of one result."""
    facts = hardware()
    key = f"{benchmark.name} on {device_kind(facts)}"
    libraries = library_versions(("torch", "numpy"))
    lines = [
        f"## {key}",
        benchmark.summary,
        f"{today()}, revision {revision()}; {', '.join(f'{k} {v}' for k, v in facts.items())}; {threads} threads; "
        f"{', '.join(f'{k} {v}' for k, v in libraries.items())}; {seconds:.0f} s. "
        f"Again: `python -m benchmarks.run {benchmark.name} --threads {threads}`",
    ]
    checks = result_checks(measured)
    lines += [checks_table(checks).to_markdown()] if checks else []
    lines += [table.to_markdown() for table in tables(measured)]
    return key, "\n\n".join(lines)


def update(text: str, key: str, content: str) -> str:
    """``text`` with the section of ``key`` replaced, or added at the end; nothing else changes."""
    begin, end = f"<!-- begin {key} -->", f"<!-- end {key} -->"
    block = f"{begin}\n{content}\n{end}"
    pattern = re.compile(re.escape(begin) + r"\n.*?" + re.escape(end), flags=re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n{block}\n"


def main() -> int:
    description, _, usage = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = usable_cores()
    parser.add_argument("names", nargs="*", help="benchmarks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the benchmarks and stop")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to update (default: benchmarks/RESULTS.md)")
    parser.add_argument("--threads", type=int, default=cores, help="threads of each benchmark (default: all cores)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which one is given up")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder to look in")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("FILE", "RESULT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run_child(*options.child)
    benchmarks = discover(options.folder.resolve())
    if options.list:
        for benchmark in benchmarks:
            print(f"{benchmark.name:28} {benchmark.summary}")
        return 0
    if options.threads < 1:
        raise ConfigError(f"--threads={options.threads} is too small; it must be at least 1.")
    chosen = select(benchmarks, options.names)
    if not chosen:
        raise ConfigError(f"--folder={options.folder} holds no file with a measure() function.")
    failed = []
    for benchmark in chosen:
        print(f"benchmark: {benchmark.name}", flush=True)
        measured, reason, seconds = run_benchmark(benchmark, threads=options.threads, timeout_seconds=options.timeout)
        if measured is None:
            print(f"benchmark: {benchmark.name} {reason}; its section stays as it was", file=sys.stderr)
            failed.append(benchmark.name)
            continue
        checks = result_checks(measured)
        print_tables([*([checks_table(checks)] if checks else []), *tables(measured)], title=benchmark.name)
        if not all(check.passed for check in checks):
            failed.append(benchmark.name)
        text = options.results.read_text() if options.results.exists() else TITLE
        key, content = section(benchmark, measured, threads=options.threads, seconds=seconds)
        write_atomically(options.results, update(text, key, content).encode())
        print(f"benchmark: {options.results} updated")
    if failed:
        print(f"benchmark: failed or missed a threshold: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
