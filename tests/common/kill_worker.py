"""Run by test_resume.py: trains the tiny task again and again in forked children, each killed at another moment.

    python tests/common/kill_worker.py RUN_DIR SEED KILLS

A child is killed (SIGKILL) at a random file operation inside its run folder, which is mostly in the middle of a save.
The last child runs undisturbed. Children are forked so that importing torch is paid once; the parent computes nothing.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

from common.testing.tiny_task import TinyTask, TinyValidation, tiny_config, tiny_loader
from common.trainer import fit

FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def train(run_dir: Path) -> None:
    config = tiny_config(run_dir, validate_interval_steps=3, total_steps=8)
    fit(
        TinyTask(dropout=0.2), config, train_loader=tiny_loader(config), validation_loader=TinyValidation()
    )  # fmt: skip


def killed_after(run_dir: Path, operations: int) -> bool:
    """Trains in a child that dies at the given file operation; whether it died."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = operations

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in FILE_OPERATIONS and str(run_dir) in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    train(run_dir)
    os._exit(0)


def main(run_dir: Path, seed: int, kills: int) -> None:
    import torch._dynamo  # optimizers load it when first used, which would take a second in every child

    torch.set_num_threads(1)  # a forked child would wait for threads that only its parent had
    rng = random.Random(seed)
    died = [killed_after(run_dir, rng.randint(1, 60)) for _ in range(kills)]
    assert not killed_after(run_dir, -1)
    print(json.dumps(died))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
