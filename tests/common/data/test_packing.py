"""Packing against the golden case, and its independence of how documents arrive."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.packing import BlockPacker, join_documents, pack
from common.errors import ConfigError
from common.testing.golden import load_cases

EOS = 99
DOCUMENTS = st.lists(st.lists(st.integers(0, 98), max_size=12), max_size=20)


def test_golden_documents_give_the_golden_blocks(golden_dir):
    case = load_cases("radd", golden_dir)["packing"].raw
    tokens = [[ord(c) - 32 for c in document] for document in case["documents"]]
    blocks, dropped = pack(tokens, case["block_size"], case["eos"])
    assert blocks.tolist() == case["blocks"]
    assert dropped == sum(len(t) + 1 for t in tokens) - blocks.size


@given(documents=DOCUMENTS, length=st.integers(1, 9))
def test_blocks_are_the_joined_stream_without_its_remainder(documents, length):
    stream = join_documents(documents, EOS).tolist()
    blocks, dropped = pack(documents, length, EOS)
    assert blocks.reshape(-1).tolist() + stream[len(stream) - dropped :] == stream
    assert 0 <= dropped < length


@given(documents=DOCUMENTS, length=st.integers(1, 9), group=st.none() | st.integers(1, 6), data=st.data())
def test_packing_does_not_depend_on_how_documents_are_divided_over_calls(documents, length, group, data):
    packer, parts, rest = BlockPacker(length, EOS, group_size=group), [], list(documents)
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        parts += [packer.add([]), packer.add(rest[:size])]
        state, packer = packer.state_dict(), BlockPacker(length, EOS, group_size=group)
        packer.load_state_dict(state)  # and not on a restart between calls either
        rest = rest[size:]
    blocks, dropped = pack(documents, length, EOS, group_size=group)
    np.testing.assert_array_equal(np.concatenate([np.empty((0, length)), *parts]), blocks)
    assert packer.finish() == dropped


@given(documents=DOCUMENTS, length=st.integers(1, 9), group=st.integers(1, 6))
def test_groups_are_packed_by_themselves(documents, length, group):
    blocks, dropped = pack(documents, length, EOS, group_size=group)
    groups = [pack(documents[i : i + group], length, EOS) for i in range(0, len(documents), group)]
    assert blocks.tolist() == [row for part, _ in groups for row in part.tolist()]
    assert dropped == sum(lost for _, lost in groups)


def test_an_empty_document_is_a_lone_end_of_text():
    blocks, dropped = pack([[], [], [1]], 2, EOS)
    assert blocks.tolist() == [[EOS, EOS], [1, EOS]]
    assert dropped == 0


@pytest.mark.parametrize("options, name", [({"length": 0}, "length"), ({"length": 4, "group_size": 0}, "group_size")])
def test_sizes_below_one_are_refused(options, name):
    with pytest.raises(ConfigError, match=f"{name}=0"):
        BlockPacker(eos=EOS, **options)


def test_documents_may_be_joined_without_an_end():
    assert join_documents([[1, 2], [], [3]], None).tolist() == [1, 2, 3]
    blocks, dropped = pack([[1, 2], [], [3, 4, 5]], 2, None)
    assert blocks.tolist() == [[1, 2], [3, 4]] and dropped == 1
    assert join_documents([[], []], None).tolist() == []
