"""The shared configuration parts refuse values that cannot work, with the option, the value and the remedy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import BatchConfig, CheckpointConfig, OptimConfig, ParallelConfig, TrainerConfig
from common.errors import ConfigError


@given(micro=st.integers(1, 16), world=st.integers(1, 8), passes=st.integers(1, 8))
def test_accumulation_steps_rebuild_the_global_batch(micro: int, world: int, passes: int):
    batch = BatchConfig(global_size=micro * world * passes, micro_size=micro)
    assert batch.accumulation_steps(world) == passes


def test_indivisible_batch_names_the_nearest_sizes_that_work():
    with pytest.raises(ConfigError, match=r"batch.global_size=10 .* 8 and 16"):
        BatchConfig(global_size=10, micro_size=4).accumulation_steps(2)


def test_batch_below_one_pass_offers_only_sizes_that_exist():
    with pytest.raises(ConfigError, match=r"that work are 8\.$"):
        BatchConfig(global_size=3, micro_size=4).accumulation_steps(2)


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: OptimConfig(optimizer="adamw"), "optim.optimizer='adamw'.*Did you mean 'AdamW'"),
        (lambda: OptimConfig(schedule="cosin"), "optim.schedule='cosin'.*Did you mean 'cosine'"),
        (lambda: OptimConfig(beta1=1.0), r"optim.beta1=1.0 must lie in \[0, 1\)"),
        (lambda: OptimConfig(lr=float("nan")), "optim.lr=nan"),
        (lambda: ParallelConfig(plan="fsdp"), "parallel.plan='fsdp'.*Did you mean 'fsdp2'"),
        (lambda: CheckpointConfig(keep_last=0), "checkpoint.keep_last=0"),
        (lambda: BatchConfig(micro_size=0), "batch.micro_size=0"),
        (lambda: TrainerConfig(run_dir="r", total_steps=0), "total_steps=0"),
        (lambda: TrainerConfig(run_dir="r", total_steps=1, precision="f16"), "precision='f16'"),
        (lambda: TrainerConfig(run_dir="r", total_steps=1, ema_decay=1.0), r"ema_decay=1.0 must lie in \[0, 1\)"),
    ],
)
def test_bad_values_are_named(build, message: str):
    with pytest.raises(ConfigError, match=message):
        build()
