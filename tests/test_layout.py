"""Who may import whom, read from the sources: papers do not import each other, common imports no paper."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ("rpg", "mup_dit", "radd", "diffullama", "logah")
ENTRY_POINTS = {"train", "evaluate", "generate", "predict", "reproduce"}
OWN_ENTRY_POINTS = {
    "rpg": {
        "check", "collect", "commonsense", "convert", "export", "extract_conditions", "finetune",
        "generate_pdiff", "memory", "prompt", "test_network", "train_pdiff",
    },
    "logah": {"check_norms", "convert", "finetune", "generate_architectures", "graph", "prepare", "similarity"},
}  # fmt: skip
CROSS_PAPER_IMPORTS: dict[str, str] = {}  # file -> reason written beside the import; today there is none


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_common_imports_no_paper():
    for path in sources("common"):
        papers = {name.split(".")[0] for name in imported_modules(path)} & set(PAPERS)
        assert not papers, f"{path.relative_to(ROOT)} imports {papers}"


@pytest.mark.parametrize("paper", PAPERS)
def test_papers_do_not_import_each_other(paper: str):
    for path in sources(paper):
        others = ({name.split(".")[0] for name in imported_modules(path)} & set(PAPERS)) - {paper}
        assert not others or str(path.relative_to(ROOT)) in CROSS_PAPER_IMPORTS, f"{path.relative_to(ROOT)}: {others}"


@pytest.mark.parametrize("paper", PAPERS)
def test_no_module_imports_an_entry_point(paper: str):
    names = ENTRY_POINTS | OWN_ENTRY_POINTS.get(paper, set())
    for path in sources(paper):
        if path.stem in names or path.parent.name == "reproduction":
            continue
        entries = {f"{paper}.{name}" for name in names} & imported_modules(path)
        assert not entries, f"{path.relative_to(ROOT)} imports the entry point {entries}"


def test_every_source_file_opens_with_a_docstring():
    for folder in ("common", *PAPERS):
        for path in sources(folder):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no module docstring"


def test_sources_hold_no_forbidden_constructs():
    forbidden = {
        "shell=True": r"shell\s*=\s*True",
        "os.system": r"\bos\.system\(",
        "bare except": r"except\s*:",
        "except: pass": r"except[^\n]*:\s*\n\s*pass\b",
    }
    for folder in ("common", *PAPERS, "benchmarks"):
        for path in sources(folder):
            text = path.read_text()
            for name, pattern in forbidden.items():
                assert not re.search(pattern, text), f"{path.relative_to(ROOT)} holds {name}"


def test_requirements_are_pinned_exactly():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        requirement = line.split("#")[0].strip()
        assert not requirement or re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][^\s]*", requirement), requirement
