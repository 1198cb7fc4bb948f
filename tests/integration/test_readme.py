"""The commands of the READMEs exist and accept their options.

Running them all would take the suite's whole time, so every ``python -m`` command is composed with ``--cfg job`` (Hydra
entry points) or ``--help`` (the others), in one process that imports each entry point once.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]


def bash_lines(readme: Path) -> list[str]:
    """Command lines of all bash blocks, continuation lines joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for readme in READMES:
        for line in bash_lines(readme):
            words = [word for word in shlex.split(line, comments=True)]
            if "-m" in words and words[words.index("-m") - 1].startswith("python"):
                module = words[words.index("-m") + 1]
                arguments = single_job(words[words.index("-m") + 2 :])
                found.append((f"{readme.relative_to(ROOT)}: {line}", [module, *arguments]))
    return found


def single_job(arguments: list[str]) -> list[str]:
    """The first job of a sweep: hydra shows the configuration of one job only."""
    if "--multirun" not in arguments:
        return arguments
    return [re.sub(r"(=[^,\[{\"']*),.*", r"\1", word) for word in arguments if word != "--multirun"]


def scripts() -> list[tuple[str, Path]]:
    found = []
    for readme in READMES:
        for line in bash_lines(readme):
            for word in shlex.split(line, comments=True):
                if word.endswith(".sh"):
                    found.append((f"{readme.relative_to(ROOT)}: {line}", ROOT / word))
    return found


def test_readme_names_scripts_that_exist():
    assert scripts()
    for where, script in scripts():
        assert script.is_file(), where
        subprocess.run(["bash", "-n", str(script)], check=True)


COMPOSE = """
import json, sys, io, contextlib, runpy
failures = []
for where, (module, *arguments) in json.loads(sys.stdin.read()):
    hydra = any("=" in a and not a.startswith("-") for a in arguments)
    sys.argv = [module, *arguments, "--cfg", "job"] if hydra else [module, "--help"]
    out = io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as stop:
        code = stop.code or 0
    if code:
        failures.append(f"{where}\\n  exit {code}: {out.getvalue()[-500:]}")
print("\\n".join(failures))
sys.exit(bool(failures))
"""


@pytest.mark.slow
def test_every_python_command_of_the_readmes_composes(tmp_path: Path):
    import json

    todo = commands()
    assert todo, "the READMEs hold no python commands"
    result = subprocess.run(
        [sys.executable, "-c", COMPOSE], input=json.dumps(todo), text=True, capture_output=True, cwd=ROOT, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def test_quickstart_checks_its_arguments():
    refused = subprocess.run(
        ["bash", "scripts/quickstart.sh", "no_such_paper"], cwd=ROOT, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "has no reproduction; choose of:" in refused.stderr
    shown = subprocess.run(
        ["bash", "scripts/quickstart.sh", "--check", "radd"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0
    assert "-m radd.reproduce --output runs/quickstart/radd" in shown.stdout
