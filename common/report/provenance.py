"""Where a report's numbers come from: revision, libraries, hardware, date; no host names and no paths."""

import datetime
import os
import platform
from pathlib import Path

from common.provenance import git_revision, library_versions


def cpu_name() -> str:
    """The processor's model name as the operating system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, str]:
    """Processor, usable cores, memory and accelerators."""
    import torch

    facts = {"cpu": cpu_name(), "cores": str(usable_cores())}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts["gpu"] = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none"
    return facts


def revision() -> str:
    """Commit of the source tree, ``+changes`` where it differs; "unknown" outside a repository."""
    return git_revision() or "unknown"


def today() -> str:
    """The date in UTC, ISO form."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def provenance(**more: object) -> dict[str, str]:
    """Flat name -> text table of a report's origin; ``more`` (seed, duration, ...) comes first."""
    facts = {name.replace("_", " "): str(value) for name, value in more.items()}
    facts |= {"date": today(), "revision": revision()}
    facts |= hardware()
    facts["libraries"] = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    return facts
