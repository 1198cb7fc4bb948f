"""Tables of the reproduction, from runs and the jobs' results."""

from collections.abc import Mapping, Sequence

from common.evaluation.metric import mean_metric
from common.report import Table
from logah.reproduction.checks import percent, shown
from logah.reproduction.runs import Run, difference_at, mean_at, rates, reaching, steps_to_reach
from logah.reproduction.settings import RANDOM, VISION, Arm, Settings, Space

Starts = Mapping[str, Sequence[Run]]
"""Label -> runs."""


def vision_table(settings: Settings, starts: Starts) -> Table:
    """Accuracy by net, learning rate and start after every epoch."""
    points = range(settings.epochs + 1)
    rows = []
    for net in settings.vision_nets:
        for lr in settings.vision_lrs:
            for label, runs in starts.items():
                cell = [run for run in runs if run.net == net.label and run.lr == lr]
                rows.append(
                    [net.label, f"{lr:g}", label, len(cell), *(percent(mean_at(cell, point)) for point in points)]
                )
    columns = ["net", "lr", "start", "runs", *(f"epoch {point}" for point in points)]
    caption = (
        "Accuracy on 360 unseen digits in percent, by net (depth x width), learning rate and start, after every epoch; "
        "errors over data orders."
    )
    return Table(name="vision", columns=columns, rows=rows, caption=caption)


def vision_means_table(settings: Settings, starts: Starts, parameters: Mapping[str, int]) -> Table:
    """Means over nets, learning rates and data orders.

    Args:
        parameters: label of a start -> size of its hypernetwork.
    """
    last = settings.epochs
    base = next(iter(starts.values()))
    rows = []
    for label, runs in starts.items():
        gain = difference_at(runs, base, last) if runs is not base else None
        means = [percent(mean_at(runs, point)) for point in range(last + 1)]
        orders = len({run.order for run in runs})
        rows.append(
            [label, parameters.get(label), orders, *means, "–" if gain is None else percent(gain, "+.1f")],
        )
    columns = [
        "start", "parameters of the hypernetwork", "data orders", *(f"epoch {point}" for point in range(last + 1)),
        "gain over random",
    ]  # fmt: skip
    caption = (
        f"Mean accuracy in percent over {len(settings.vision_nets)} unseen nets and {len(settings.vision_lrs)} "
        "learning rates; errors over these runs, the gain's over pairs of the same net, rate and data "
        "order. Starts with fewer data orders are compared on those."
    )
    return Table(name="vision_means", columns=columns, rows=rows, caption=caption)


def zero_shot_table(settings: Settings, found: Mapping[str, Mapping]) -> Table:
    """Accuracy of predictions by size, without any training.

    Args:
        found: label of an arm -> result of its job.
    """
    space = settings.vision_space
    rows = []
    for place, net in enumerate(settings.zero_shot_nets):
        beyond = [
            name
            for name, value, known in (("depth", net.depth, space.depths), ("width", net.width, space.widths))
            if value > max(known)
        ]
        scores = [result["rows"][place] for result in found.values()]
        cells = [f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}" for row in scores]
        rows.append([net.label, net.heads, " and ".join(beyond) or "–", *cells])
    columns = ["net", "heads", "beyond training in", *found]
    caption = (
        "Accuracy in percent of predicted networks that were never trained, by depth x width; chance is 10. Errors "
        "over the 360 images."
    )
    return Table(name="zero_shot", columns=columns, rows=rows, caption=caption)


def language_table(settings: Settings, starts: Starts) -> Table:
    """Loss by net, learning rate and start at every step that was scored."""
    points = sorted({point for runs in starts.values() for run in runs for point in run.points})
    rows = []
    for net in settings.language_nets:
        for lr in settings.language_lrs:
            for label, runs in starts.items():
                cell = [run for run in runs if run.net == net.label and run.lr == lr]
                scores = [shown(mean_at(cell, point)) if reaching(cell, point) else "–" for point in points]
                rows.append([net.label, f"{lr:g}", label, len(cell), *scores])
    columns = ["net", "lr", "start", "runs", *(f"step {point}" for point in points)]
    caption = (
        f"Nats per token of held-out text ({settings.held_out_blocks} blocks of {settings.block_size} tokens of whole "
        "topics), by net (depth x width), learning rate and start."
    )
    return Table(name="language", columns=columns, rows=rows, caption=caption)


def crossover_table(settings: Settings, starts: Starts) -> Table:
    """How long random starts take to the loss of an early predicted one, and who is ahead in the end."""
    label, logah = next((label, runs) for label, runs in starts.items() if label != RANDOM)
    random = starts[RANDOM]
    rows = []
    for net in settings.language_nets:
        for lr in rates(logah):
            ours = [run for run in logah if run.net == net.label and run.lr == lr]
            theirs = [run for run in random if run.net == net.label and run.lr == lr]
            if not ours or not theirs:
                continue
            last = min(max(run.points[-1] for run in ours), max(run.points[-1] for run in theirs))
            level = mean_at(ours, settings.early_step)
            taken = [steps_to_reach(run, level.value) for run in theirs]
            reached = [steps for steps in taken if steps is not None]
            steps = shown(mean_metric("steps", reached), ".0f") if len(reached) == len(taken) else f"> {last}"
            ahead = difference_at(ours, theirs, last)
            who = label if ahead.value < 0 else RANDOM
            rows.append([net.label, f"{lr:g}", shown(level), steps, last, shown(ahead, "+.3f"), who])
    columns = [
        "net", "lr", f"{label} at step {settings.early_step}", "random: steps to that loss", "last step",
        f"{label} - random there", "ahead",
    ]  # fmt: skip
    caption = (
        "Language: steps that random weights need to the loss that the predicted start has early on, and the "
        "difference in the end (below 0: the predicted start is ahead). With enough steps and a tuned "
        "learning rate random starts overtake."
    )
    return Table(name="crossover", columns=columns, rows=rows, caption=caption)


def hypernetwork_table(settings: Settings, found: Sequence[tuple[Arm, Mapping]]) -> Table:
    """What was trained.

    Args:
        found: arms and the results of their training.
    """
    rows = []
    for arm, result in found:
        batch = settings.vision_batch if arm.kind == VISION else settings.language_batch
        data = "digits" if arm.kind == VISION else "text"
        sizes = [result["parameters"], arm.first_steps + arm.steps, batch, f"{arm.lr:g}"]
        rows.append([data, arm.label, *sizes, result["last"], round(result["seconds"])])
    columns = ["data", "hypernetwork", "parameters", "steps", "batch", "lr", "last loss", "processor seconds"]

    def range_of(space: Space) -> str:
        return f"depth {space.depths[0]}-{space.depths[-1]}, width {space.widths[0]}-{space.widths[-1]}"

    caption = (
        f"The hypernetworks: width {settings.hid}, {settings.layers} layers, rank {settings.lora_r}. One sampled net a "
        f"step, vision: {range_of(settings.vision_space)}, language: {range_of(settings.language_space)}. The last "
        "loss is the mean of the last logged steps on fresh predictions."
    )
    return Table(name="hypernetworks", columns=columns, rows=rows, caption=caption)


def seeds_table(rows: Sequence[tuple[str, Sequence[float]]]) -> Table:
    """How much the results depend on the hypernetwork's seed.

    Args:
        rows: label and a number per seed.
    """
    body = [[label, len(found), shown(mean_metric("mean", found)), min(found), max(found)] for label, found in rows]
    columns = ["result", "hypernetworks", "mean", "least", "most"]
    caption = "Over hypernetworks trained with different seeds, each with its own runs; errors over hypernetworks."
    return Table(name="seeds", columns=columns, rows=body, caption=caption)
