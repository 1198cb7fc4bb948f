"""Adapters as checkpoints: fine-tuned here and saved at consecutive steps, or taken over from a run elsewhere.

Source: DoRA experiments of "Recurrent Diffusion for Large-Scale Parameter Generation" (arXiv 2501.11587), where an
external fine-tuning is watched and its newest 50 adapters are kept.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from common.checkpoint import write_json
from common.errors import CheckpointError, DataError
from common.folders import write_folder
from common.seeding import derive_seed
from rpg.adapters import WEIGHT_FILES, is_adapter_folder, read_adapter
from rpg.lora_config import AdapterSection
from rpg.lora_model import (
    AdapterText,
    build_adapted_model,
    check_vocabulary,
    compute_score,
    forward_precision,
    load_adapter_state,
    next_token_losses,
)
from rpg.tasks import CheckpointName, parse_name
from rpg.zoo.classifiers import StateFile
from rpg.zoo.recipes import Recipe
from rpg.zoo.testers import WORK_FOLDER
from rpg.zoo.tiny_llama import write_tiny_llama

TINY = "tiny"
Report = Callable[[str], None]


def collect_adapters(
    recipe: Recipe, output: Path, *, device: str | None = None, progress: Report = lambda _: None
) -> None:
    """Fills ``output`` with adapter folders; continues what was interrupted."""
    if recipe.adapters.watch is not None:
        watch(recipe, output, progress=progress)
        return
    if len(saved_adapters(recipe, output)) < recipe.saving.count:
        fine_tune(recipe, output, device or ("cuda" if torch.cuda.is_available() else "cpu"), progress)


def saved_adapters(recipe: Recipe, output: Path) -> list[Path]:
    """Adapters of this recipe that are complete, by number."""
    found = [path for path in output.iterdir() if is_adapter_folder(path)] if output.is_dir() else []
    names = {path: parse_name(path) for path in found}
    return sorted((path for path, name in names.items() if name and name.tag == recipe.file_tag), key=lambda p: p.name)


# ------------------------------------------------------------------------------------------------------------ training


def fine_tune(recipe: Recipe, output: Path, device: str, progress: Report) -> None:
    """Trains one adapter and saves it at ``saving.count`` steps after the first ``adapters.steps``."""
    from peft import get_peft_model_state_dict

    section = with_model(recipe.adapters, output)
    model, text = build_adapted_model(section, recipe.seed, device), AdapterText(section)
    check_vocabulary(model, text, section)
    precision = forward_precision(section, device)
    test_NL = text.rows_NL(text.test_rows).to(device)
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=section.lr, weight_decay=section.weight_decay)
    state_file = StateFile(output / WORK_FOLDER / "adapter.pt")
    step, saved = 0, 0
    if found := state_file.read():
        load_adapter_state(model, found["adapter"])
        optimizer.load_state_dict(found["optimizer"])
        step, saved = found["step"], found["saved"]
        progress(f"continues after step {step} and {saved} adapters")

    def state() -> Mapping[str, object]:
        return {
            "adapter": get_peft_model_state_dict(model),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "saved": saved,
        }

    while saved < recipe.saving.count:
        loss = _step(model, optimizer, text, section, step, recipe.seed, device, precision)
        step += 1
        if step % 50 == 0:
            progress(f"step {step}: loss {loss:.4f}")
        if step > section.steps and (step - section.steps) % section.interval == 0:
            saved += 1
            test_loss, accuracy = compute_score(model, test_NL, section.micro_size, precision)
            name = CheckpointName(saved, accuracy, recipe.file_tag)
            for left in output.glob(f"{saved:04d}_acc*_{recipe.file_tag}"):  # of a run that was killed before its state
                if parse_name(left) is not None and is_adapter_folder(left):
                    shutil.rmtree(left)
            write_folder(output / str(name), lambda folder: save_adapter(model, folder))
            progress(f"adapter {saved} of {recipe.saving.count}: loss {test_loss:.4f}, accuracy {accuracy:.4f}")
        state_file.write(state)
    state_file.remove()


def with_model(section: AdapterSection, collection: Path) -> AdapterSection:
    """The section with the folder of the tiny model in the place of its name; the model is made if it is not there."""
    if section.model != TINY:
        return section
    folder = collection / WORK_FOLDER / "tiny_llama"
    if not folder.is_dir():
        write_tiny_llama(folder)
    return replace(section, model=str(folder), tokenizer=section.tokenizer or "byte")


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: AdapterText,
    section: AdapterSection,
    step: int,
    seed: int,
    device: str,
    precision: str,
) -> float:
    """One optimizer step; returns the loss."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = section.lr * min(1.0, (step + 1) / section.warmup) if section.warmup else section.lr
    optimizer.zero_grad(set_to_none=True)
    tokens_NL, total = text.batch_NL(step, section.batch_size, seed).to(device), 0.0
    # dropout knows only the global generator: seeded by the step, so that a continued run drops the same units
    with torch.random.fork_rng(devices=[device] if str(device).startswith("cuda") else []):
        torch.manual_seed(derive_seed(seed, "dropout", step))
        for rows_NL in tokens_NL.split(section.micro_size):
            loss = next_token_losses(model, rows_NL, precision)[0].mean() * (len(rows_NL) / len(tokens_NL))
            loss.backward()
            total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    return total


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Writes what ``PeftModel.from_pretrained`` reads."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


# ------------------------------------------------------------------------------------------------------------ watching


def watch(
    recipe: Recipe,
    output: Path,
    *,
    progress: Report = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Copies every adapter that appears below ``adapters.watch``, or changes there, and keeps the newest.

    An adapter counts when its file has stayed the same between two looks and can be read. Ends after
    ``adapters.idle_seconds`` without a new one; the same command again goes on.

    Raises: DataError if there is no such folder.
    """
    section, record = recipe.adapters, output / WORK_FOLDER / "watched.json"
    source = Path(section.watch)
    if not source.is_dir():
        raise DataError(f"adapters.watch={source} is no folder; give the one that the other program writes into.")
    taken = _read_taken(record)
    seen: dict[str, str] = {}
    number = max((entry["number"] for entry in taken.values()), default=0)
    newest = clock()
    while True:
        now = stamps(source)
        for name, stamp in sorted(now.items(), key=lambda item: int(item[1].split("-")[0])):
            if name in taken and taken[name]["stamp"] == stamp:
                continue
            if seen.get(name) != stamp:
                continue  # new since the last look: it may still be written
            target = output / f"{number + 1:04d}_{recipe.file_tag}"
            if not _take(source / name, target, progress):
                continue
            number += 1
            taken[name] = {"stamp": stamp, "number": number}
            write_json(record, taken)
            newest = clock()
            _drop_old(output, recipe, section.keep)
            progress(f"{name} is {target.name}")
        seen = now
        if clock() - newest >= section.idle_seconds:
            progress(f"nothing new for {section.idle_seconds:g} s; {number} adapters came")
            return
        sleep(section.poll_seconds)


def stamps(source: Path) -> dict[str, str]:
    """Adapter folders below (or at) ``source``: relative name -> time and size of the weights."""
    found = {}
    for config in source.rglob("adapter_config.json"):
        folder = config.parent
        for name in WEIGHT_FILES:
            file = folder / name
            if file.is_file():
                facts = file.stat()
                found[folder.relative_to(source).as_posix()] = f"{facts.st_mtime_ns}-{facts.st_size}"
                break
    return found


def _read_taken(record: Path) -> dict[str, dict]:
    try:
        return json.loads(record.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{record} is damaged ({error}); delete it to take all adapters over again.") from None


def _take(folder: Path, target: Path, progress: Report) -> bool:
    """Copies one adapter; False, with a message, if it cannot be read (yet)."""
    try:
        read_adapter(folder)
    except CheckpointError as error:
        progress(f"{folder} is left for later: {error}")
        return False
    wanted = ("adapter_config.json", *WEIGHT_FILES)

    def copy(to: Path) -> None:
        for name in wanted:
            if (folder / name).is_file():
                shutil.copy2(folder / name, to / name)

    write_folder(target, copy)
    return True


def _drop_old(output: Path, recipe: Recipe, keep: int) -> None:
    """Removes all but the newest ``keep`` adapters that were taken over."""
    ours = sorted(path for path in output.glob(f"[0-9]*_{recipe.file_tag}") if is_adapter_folder(path))
    for path in ours[: max(0, len(ours) - keep)]:
        shutil.rmtree(path)
