"""What the report's commands share: user errors become one line on stderr and exit code 2."""

import os
import sys
from collections.abc import Callable

from common.errors import QuintetError


def exit_code(main: Callable[[], int | None]) -> int:
    """Runs ``main``; a user's error is printed without a traceback (``QUINTET_TRACEBACK=1`` shows it)."""
    try:
        return main() or 0
    except QuintetError as error:
        if os.environ.get("QUINTET_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
