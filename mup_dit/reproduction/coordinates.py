"""The coordinate check of the reproduction: activations over widths for muP and the two controls."""

from mup_dit.building import flat_options
from mup_dit.coordinate_check import CoordCheckConfig, run_check, shown_modules
from mup_dit.coordinates import mean_sizes, slopes
from mup_dit.data import DataSection
from mup_dit.reproduction.settings import Settings


def check(settings: dict, parametrization: str, seed: int) -> dict:
    """Verdict, the slopes of all modules, and the activations of some of them at the last step."""
    chosen = Settings.from_dict(settings)
    network = chosen.network(parametrization, chosen.base_heads, depth=chosen.check_depth)
    config = CoordCheckConfig(
        seed=seed,
        model=flat_options(network),
        data=DataSection(train="digits"),
        heads=list(chosen.check_heads),
        lr=2.0**chosen.check_loglr,
        steps=chosen.check_steps,
        seeds=chosen.check_seeds,
        batch_size=chosen.batch_size,
    )
    found, verdict = run_check(config, progress=False)
    sizes = mean_sizes(found)
    last = chosen.check_steps
    names = shown_modules([module for module, step in sizes if step == last])
    return {
        "verdict": verdict.as_dict(),
        "slopes": [[item.module, item.step, round(item.slope, 4)] for item in slopes(found)],
        "sizes": {name: [[width, value] for width, value in sizes[name, last].items()] for name in names},
    }
