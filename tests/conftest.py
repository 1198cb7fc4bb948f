"""Shared fixtures: one thread per process (tests run in parallel), offline libraries, hypothesis without deadlines."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from common.testing.golden import DEFAULT_GOLDEN_DIR

torch.set_num_threads(1)
settings.register_profile("quintet", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("quintet")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", default=str(DEFAULT_GOLDEN_DIR), help="folder with golden cases by paper")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A command line sets the root logger's level: restored, so that no test depends on those before it."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--golden"))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]
