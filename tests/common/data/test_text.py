"""The embedded English text: real, stable, split by document."""

import subprocess
import sys

import pytest

from common.data.text import docstring_documents, embedded_documents, topic_documents
from common.errors import ConfigError


def test_every_tenth_topic_in_sorted_order_is_a_test_document():
    documents = topic_documents()
    test = [text for index, text in enumerate(documents) if index % 10 == 5]
    assert embedded_documents("test", "topics") == test
    assert sorted(embedded_documents("train", "topics") + test) == sorted(documents)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the counts are those of CPython 3.11")
def test_topics_give_the_block_counts_of_the_specification():
    """Exactly so with the text of CPython 3.11.7; other releases of 3.11 differ by a few sentences."""
    is_specified = sum(map(len, topic_documents())) == 464970
    for split, blocks in (("train", 6713), ("test", 570)):
        found = sum(len(text.encode()) + 1 for text in embedded_documents(split, "topics")) // 64
        assert found == blocks if is_specified else found == pytest.approx(blocks, rel=0.01)


def test_docstrings_are_a_megabyte_of_prose_split_by_document():
    train, test = embedded_documents("train", "docstrings"), embedded_documents("test", "docstrings")
    assert sum(map(len, train)) > 800_000
    assert sum(map(len, test)) > 50_000
    assert not set(train) & set(test)
    assert any("JSON (JavaScript Object Notation)" in text for text in docstring_documents())


def test_all_is_topics_followed_by_docstrings():
    parts = [embedded_documents("test", source) for source in ("topics", "docstrings")]
    assert embedded_documents("test", "all") == embedded_documents("test") == parts[0] + parts[1]


def test_reading_docstrings_imports_none_of_the_modules():
    program = (
        "import sys; from common.data.text import docstring_documents; docstring_documents();"
        "print([m for m in ('antigravity', 'this', 'turtle', 'xmlrpc.server') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [("validation",), ("train", "wikipedia")])
def test_another_split_or_source_is_refused(arguments):
    with pytest.raises(ConfigError, match="must be one of"):
        embedded_documents(*arguments)
