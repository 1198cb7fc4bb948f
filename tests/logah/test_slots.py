"""What a step reads: its places of the meta-batch, and one mini-batch for all of them."""

import torch

from logah.data import build_data
from logah.data_config import DataSection
from logah.slots import Slots, build_slot_loader


def data():
    return build_data(DataSection(name="digits", batch_size=8, limit_train=20), seed=3)


def test_places_of_a_step_share_its_mini_batch():
    slots = Slots(data(), meta_batch=4, total_steps=3)
    batch = slots.fetch([5, 6])
    assert batch["step"].tolist() == [1, 1] and batch["slot"].tolist() == [1, 2]
    assert torch.equal(batch["images"], data().training_batch(1)["images"])
    assert len(slots) == 12


def test_processes_and_passes_take_places_in_turn():
    slots = Slots(data(), meta_batch=4, total_steps=3)
    seen = []
    for rank in (0, 1):
        batches = iter(build_slot_loader(slots, micro_size=1, seed=0, rank=rank, world_size=2))
        seen.append([(int(b["step"][0]), b["slot"].tolist()) for b in (next(batches) for _ in range(4))])
    assert seen == [[(0, [0]), (0, [2]), (1, [0]), (1, [2])], [(0, [1]), (0, [3]), (1, [1]), (1, [3])]]


def test_a_longer_run_continues_where_a_shorter_one_ended():
    short, long = (Slots(data(), meta_batch=2, total_steps=steps) for steps in (2, 5))
    first = build_slot_loader(short, micro_size=2, seed=0, rank=0, world_size=1)
    batches = iter(first)
    for _ in range(2):
        next(batches)
    second = build_slot_loader(long, micro_size=2, seed=0, rank=0, world_size=1)
    second.load_state_dict(first.state_dict())
    assert int(next(iter(second))["step"][0]) == 2
