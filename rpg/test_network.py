"""Tests a checkpoint, or all of a folder: prints ``Loss: 0.1234 | Acc: 0.9876`` for each.

    python -m rpg.test_network path=checkpoints/digits/0001_acc0.9740_digits_cnn.pth
    python -m rpg.test_network recipe=digits_cnn path=generated output=accuracies.csv
    python -m rpg.test_network path=FILE tester.kind=python tester.target=my_module:MyTester
    python -m rpg.test_network path=FILE tester.kind=command 'tester.command=["{python}",test.py,"{path}"]'

Exit code 1: a test failed. Options: ``--help``.
"""

import sys
from pathlib import Path

from common import cli
from rpg.network_tests import (
    TestNetworkConfig,
    accuracy_per_class,
    class_names,
    find_networks,
    find_tester,
    mean_line,
    test_networks,
    write_results,
)
from rpg.testing import build_tester


def main() -> int:
    """The command line."""
    return cli.run(run, "test_network", TestNetworkConfig, "configs/rpg", print_config=False)


def run(config: TestNetworkConfig) -> int:
    """Tests as configured; 1 if a test failed."""
    paths = find_networks(config.path)
    tester = build_tester(find_tester(config))
    results = []
    for path, result in test_networks(paths, tester):
        results.append((path, result))
        print(f"{path.name}: {result}" if len(paths) > 1 else result)
        if result.error is not None and result.output:
            print(result.output.rstrip(), file=sys.stderr)
        if config.detail and result.error is None:
            shares = accuracy_per_class(path, tester)
            for name, share in zip(class_names(tester, len(shares)), shares, strict=True):
                print(f"  {name}: {share:.4f}")
    if len(results) > 1:
        print(mean_line(results))
    if config.output is not None:
        write_results(Path(config.output), results)
    return int(any(result.error is not None for _, result in results))


if __name__ == "__main__":
    sys.exit(main())
