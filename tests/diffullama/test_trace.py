"""The page on which texts are denoised: pieces of text, when they appear, nothing that could be run or loaded."""

import json
import re

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from common.diffusion.reveal import AFTER_STOP, GIVEN
from diffullama.trace import MASK_SIGN, animation, split_text, traced_text


def byte_level() -> HuggingFaceTokenizer:
    """One token per UTF-8 byte, as byte-pair encodings without merges have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({"<|endoftext|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"))


def test_pieces_join_to_the_text_and_characters_stay_whole():
    tokenizer = byte_level()
    ids = tokenizer.encode("naïve €5")
    pieces = split_text(ids, tokenizer)
    assert "".join(text for _, _, text in pieces) == "naïve €5"
    assert [end - start for start, end, text in pieces if text in "ï€"] == [2, 3]
    assert [start for start, _, _ in pieces][1:] == [end for _, end, _ in pieces][:-1]
    assert split_text([7, 8], None) == [(0, 1, "7 "), (1, 2, "8 ")]


def test_a_piece_appears_with_its_last_token():
    tokenizer = byte_level()
    ids = torch.tensor(tokenizer.encode("aï!b"))
    text = traced_text("row", ids, torch.tensor([GIVEN, 0, 2, 1, AFTER_STOP]), tokenizer)
    assert text.calls == 3
    assert list(text.pieces) == [("a", GIVEN, 1), ("ï", 2, 2), ("!", 1, 1), ("b", 2, 1)]


def test_the_page_is_self_contained_and_escapes_what_the_model_wrote():
    tokens = torch.tensor(ByteTokenizer().encode("</script><img src=x onerror=alert(1)>"))
    text = traced_text("<b>", tokens, torch.zeros(len(tokens), dtype=torch.int64), ByteTokenizer())
    page = animation([text], "T & T", "n")
    assert "<img" not in page
    assert "&lt;b&gt;" in page
    assert "T &amp; T" in page
    assert page.count("</script>") == 2
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=", page.replace("src=x", ""))
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert "".join(piece for piece, _, _ in data[0]["pieces"]) == "</script><img src=x onerror=alert(1)>"
    assert json.dumps(MASK_SIGN) in page


def test_a_page_without_calls_is_no_error():
    given = traced_text("row", torch.tensor([65]), torch.tensor([GIVEN]), ByteTokenizer())
    assert given.calls == 0
    assert "A" in animation([given])
