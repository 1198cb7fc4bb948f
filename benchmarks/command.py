"""The command line of a benchmark whose ``measure`` takes a number of repeats. No benchmark itself."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path


def main(measure: Callable[[int], dict], description: str | None) -> None:
    """Prints the figures as JSON, and writes them where ``--json`` says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds")
    options = parser.parse_args()
    text = json.dumps(measure(options.repeats), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text)
