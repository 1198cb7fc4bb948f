"""Runs say which sources and libraries made them."""

import json
import re
from pathlib import Path

from common import provenance


def test_origin_is_json_and_names_seed_and_libraries():
    facts = json.loads(json.dumps(provenance.collect(seed=7)))
    assert facts["seed"] == 7
    assert set(facts["versions"]) >= {"python", "torch", "numpy", "safetensors"}
    assert facts["git_revision"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", facts["git_revision"])


def test_outside_a_repository_there_is_no_revision(monkeypatch):
    monkeypatch.setattr(provenance, "_git", lambda *arguments: None)
    provenance.git_revision.cache_clear()
    try:
        assert provenance.git_revision() is None
    finally:
        provenance.git_revision.cache_clear()


def test_the_origin_holds_no_path_of_this_machine():
    assert str(Path.home()) not in json.dumps(provenance.collect())
