"""Sources without files: their documents and fingerprints."""

import pytest

from common.data.sources import DocumentList, EmbeddedText
from common.data.text import embedded_documents


def test_a_list_is_a_source_whose_fingerprint_separates_documents():
    source = DocumentList(["ab", "c"])
    assert list(source.documents()) == list(source.documents()) == ["ab", "c"]
    assert source.num_documents == 2
    assert source.fingerprint() != DocumentList(["a", "bc"]).fingerprint()


@pytest.mark.parametrize("source", ["topics", "docstrings", "all"])
def test_embedded_text_is_a_source_with_one_fingerprint_per_split(source):
    train, test = EmbeddedText("train", source), EmbeddedText("test", source)
    assert list(test.documents()) == embedded_documents("test", source)
    assert test.fingerprint() == EmbeddedText("test", source).fingerprint() != train.fingerprint()
