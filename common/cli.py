"""Entry points: Hydra composes the options, a frozen dataclass checks them, errors of the user become one line.

An entry point is

    def main() -> int:
        return cli.run(train, "train", TrainConfig)

and has Hydra's ``--help``, ``--cfg job`` and ``--multirun``. Exit codes: 0 done, 2 an error that the user can repair
(``QUINTET_TRACEBACK=1`` adds the traceback), 85 stopped by a signal and to be started again (``run_dir/REQUEUE`` says
so too, because torchrun turns every code into 1), 130 interrupted from the keyboard.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from common.conversion import from_config, nearest, option_names, unknown_option
from common.errors import ConfigError, QuintetError

__all__ = [
    "EXIT_INTERRUPT",
    "EXIT_REQUEUE",
    "EXIT_USAGE",
    "from_config",
    "is_main_process",
    "rank",
    "run",
    "world_size",
]

EXIT_USAGE = 2
EXIT_REQUEUE = 85
EXIT_INTERRUPT = 130
ROOT = Path(__file__).resolve().parents[1]
OTHER_RANKS_WAIT_SECONDS = 5.0  # for the main process to report the same error
SWEPT_VARIABLE = "QUINTET_SWEPT_OPTIONS"  # tells the workers of a sweep which options name their folder
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

logger = logging.getLogger(__name__)


def run(
    main: Callable[[Any], int | None],
    config_name: str,
    config_class: type,
    config_dir: str = "configs/radd",
    *,
    print_config: bool = True,
) -> int:
    """Composes ``config_dir/config_name.yaml`` with the command line's overrides and calls ``main`` with the result.

    Args:
        main: gets an instance of ``config_class``; returns an exit code or None.
        config_name: the primary configuration, without ``.yaml``.
        config_class: the dataclass that receives and checks it.
        config_dir: folder of the primary configuration, relative to the repository.
        print_config: whether the main process shows the composed options on stderr first.

    Returns:
        0, if ``main`` returned 0 or None.

    Raises: SystemExit with one of the codes above otherwise.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing its own report and leaving with code 1
    os.environ[SWEPT_VARIABLE] = ",".join(_swept_options(sys.argv[1:]))
    folder = Path(ROOT, config_dir)

    @functools.wraps(main)
    def job(composed: DictConfig) -> int:
        with contextlib.nullcontext() if _in_remote_worker() else _errors_reported(config_class, folder):
            _set_up_logging()
            _join_submitit_tasks()
            config = _typed(composed, config_class)
            if print_config and is_main_process():
                print(OmegaConf.to_yaml(composed).rstrip(), file=sys.stderr)
            code = main(config) or 0
            if code and not _in_remote_worker():
                raise SystemExit(code)  # at once: a sweep must not go on after a signal has ended one of its jobs
        return code

    with _errors_reported(config_class, folder):
        hydra.main(version_base=None, config_path=str(folder), config_name=config_name)(job)()
    return 0


def _swept_options(arguments: list[str]) -> list[str]:
    """Names of the options that a sweep (``--multirun``) varies."""
    swept = []
    for argument in arguments:
        # what cannot be parsed is Hydra's to report
        with contextlib.suppress(HydraException, ValueError):
            override = OverridesParser.create().parse_override(argument)
            if override.is_sweep_override():
                swept.append(override.key_or_group)
    return swept


def _sweep_folder(overrides: list[str], job_number: int) -> str:
    """A job's folder inside the sweep's: its values of the varied options, in names that a file system takes."""
    swept = os.environ.get(SWEPT_VARIABLE, "").split(",")
    values = [override for override in overrides if override.split("=")[0].lstrip("+") in swept]
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(sorted(values)))
    return name if 0 < len(name) <= 200 else str(job_number)


OmegaConf.register_new_resolver(
    "sweep_folder", lambda: _sweep_folder(HydraConfig.get().overrides.task, HydraConfig.get().job.num), replace=True
)


def _typed(composed: DictConfig, config_class: type) -> Any:
    """The composed options as ``config_class``; in a sweep, each job gets a run folder of its own."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{missing[0]} has no value and no default; add {missing[0]}=... to the command.")
    if HydraConfig.get().mode == RunMode.MULTIRUN and "run_dir" in composed:
        composed.run_dir = HydraConfig.get().runtime.output_dir
    return from_config(config_class, composed)


def is_main_process() -> bool:
    """Whether this process speaks for the run: rank 0, or the only one."""
    return rank() == 0


def rank() -> int:
    """This process's number, as torchrun announces it; 0 without it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Processes of this run, as torchrun announces them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _set_up_logging() -> None:
    """Messages of the main process on stderr, one line each; other processes keep quiet about what all of them see."""
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(level)
    for noisy in ("huggingface_hub", "httpx", "datasets", "DeepSpeed", "submitit", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _launcher_name() -> str:
    launcher = HydraConfig.get().launcher if HydraConfig.initialized() else {}
    return str(launcher.get("_target_", ""))


def _in_remote_worker() -> bool:
    """Whether this is a job of a sweep that a launcher runs in another process: its errors travel to the parent."""
    return bool(_launcher_name()) and not _launcher_name().endswith("BasicLauncher")


def _join_submitit_tasks() -> None:
    """Tasks that submitit started together become ranks of one run, as torchrun's would."""
    if "submitit" in _launcher_name() and int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "RANK" not in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export()


# ---------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def _errors_reported(config_class: type, folder: Path) -> Iterator[None]:
    """Turns errors that the user can repair into one message on stderr and exit code 2; bugs keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _report("interrupted; the same command continues from the last checkpoint", prefix="")
        raise SystemExit(EXIT_INTERRUPT) from None
    except QuintetError as error:
        _fail(str(error), error)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error, config_class, folder), error)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        _fail(
            f"{error.filename or 'writing a file'}: {error.strerror}; free disk space or check permissions, then run "
            "the same command again. What was written before is intact.",
            error,
        )
    except RuntimeError as error:
        if "srun" in str(error) and _is_from("submitit", error):
            _fail(
                "launcher=slurm needs SLURM's srun and sbatch, which are not on this machine; use launcher=local.",
                error,
            )
        if "out of memory" not in str(error).lower():
            raise
        _fail(
            f"{str(error).splitlines()[0]} Use smaller forward passes (more accumulation), activation checkpointing, "
            "or a plan that shards (parallel=fsdp2); dry_run=true shows the memory of each.",
            error,
        )


def _is_from(package: str, error: BaseException) -> bool:
    """Whether ``error`` was raised inside ``package``."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").split(".")[0] == package


def _fail(message: str, error: BaseException) -> None:
    if os.environ.get("QUINTET_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error)
    _report(message)
    raise SystemExit(EXIT_USAGE) from None


def _report(message: str, prefix: str = "error: ") -> None:
    """Prints once over all processes."""
    if not is_main_process():
        # torchrun ends all processes as soon as one has failed. Whoever is still alive after this wait has an error of
        # its own, for example a file that is missing on one node only.
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
        prefix = f"rank {rank()}: {prefix}"
    print(f"{prefix}{message}", file=sys.stderr, flush=True)


def explain(error: Exception, config_class: type, folder: Path) -> str:
    """One line for an error of Hydra or OmegaConf: the option, what is wrong with it, what would work."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_choice(error)
    if isinstance(error, OverrideParseException):
        lines = [line for line in error.message.splitlines() if not line.startswith(("Error parsing", "See http"))]
        reason = "" if "=" not in error.override or not lines else f": {_one_line(lines[0])}"
        return (
            f"cannot read {error.override!r}{reason}. Options are written key=value; quote values with spaces, commas "
            "or brackets twice: 'key=\"a, b\"'."
        )
    text = str(error)
    unknown = re.search(r"Could not (?:override|delete from config\.) '([^']+)'", text)
    if unknown or (unknown := re.search(r"Key '[^']+' is not in struct\s+full_key: (\S+)", text)):
        option, known = unknown[1].split("@")[0], option_names(config_class)
        if option in known:  # a file of its group leaves it out, because the choice has no use for it
            group = option.partition(".")[0]
            return (
                f"{option} is not an option of the {group} that is chosen; choose another with {group}=NAME (--help "
                f"lists them), or set it nevertheless with ++{option}=..."
            )
        return unknown_option(option, known + group_names(folder))
    if isinstance(error, InterpolationKeyError):
        referred = re.search(r"'([^']+)' not found", text)
        near = nearest(referred[1], option_names(config_class)) if referred else []
        hint = f"did you mean ${{{near[0]}}}?" if near else "--cfg job shows all options."
        return f"{error.full_key} refers to {referred[1] if referred else 'an option'}, which does not exist; {hint}"
    name = getattr(error, "full_key", None)
    return f"{f'{name}: ' if name else ''}{_one_line(getattr(error, 'msg', None) or text)}"


def _missing_choice(error: MissingConfigException) -> str:
    group, _, choice = error.missing_cfg_file.rpartition("/")
    options = sorted(error.options or [])
    if "submitit" in choice or "joblib" in choice:
        package = f"hydra-{'submitit' if 'submitit' in choice else 'joblib'}-launcher"
        return f"{group}={choice} needs the package {package}, which is not installed: `pip install {package}`."
    if not group:
        return f"--config-name {choice} does not exist."
    near = nearest(choice, options)
    if not near:  # words in another order: radd_small for small_radd
        words = set(re.split(r"[_\W]+", choice))
        near = sorted(options, key=lambda option: -len(words & set(re.split(r"[_\W]+", option))))[:1]
        near = near if near and words & set(re.split(r"[_\W]+", near[0])) else []
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{group}={choice} is not known; choose one of {', '.join(options) or '(there is none)'}.{hint}"


def group_names(folder: Path) -> list[str]:
    """Names of the configuration groups that a primary configuration in ``folder`` can use."""
    found: set[str] = set()
    for root in (folder, folder.parent / "common"):
        found |= {path.parent.relative_to(root).as_posix() for path in root.glob("*/**/*.yaml")}
    return sorted(found)


def _one_line(text: str) -> str:
    return " ".join(text.split())
