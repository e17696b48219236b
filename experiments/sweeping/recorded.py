"""What a sweep's record may decide when the sweep is resumed.

The folder may come from somebody else, and Hydra's settings can start any program: a launcher, a logger, the
environment of a job. So only the keys of the script's own config are taken from a record, and those of
Hydra's settings that are named here. Any other setting has to be given again, so a new option of a sweeper
belongs in one of these lists.
"""

import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from llm.config_values import leaf_keys
from llm.errors import UserError
from llm.sweeps.jobs import RECORD

# Settings of sweepers that have a short name: sweep.zip is hydra.sweeper.zip.
SHORT_KEYS = {f"sweep.{name}": f"hydra.sweeper.{name}" for name in ("zip", "table", "order")}
SWEEP_KEYS = ("sweep.resume", "sweep.extend", *SHORT_KEYS)
CONF = Path(__file__).parents[2] / "conf"
ORDERS = ("seeds_last", "given")  # in which jobs run
CHOICES = {
    "hydra/sweeper": ("grid", "optuna", "race"),
    "hydra/launcher": ("basic", "joblib"),
    "hydra.sweeper.order": ORDERS,
}
NUMBERS = (
    *(
        f"hydra.sweeper.{name}"
        for name in ("max_batch_size", "n_trials", "n_jobs", "n_startup_trials", "seed", "max_seeds", "level")
    ),
    "hydra.launcher.n_jobs",
    "hydra.launcher.jobs_per_device",
)
# What the jobs were made of. It need not be given again, as the record holds the jobs themselves.
PLANNED = ("hydra.sweeper.zip", "hydra.sweeper.table", "hydra.sweeper.extend", "hydra.sweeper.resume")
RESOLVER = re.compile(r"(?<!\\)(\\\\)*\$\{[^}]*:")  # such as ${oc.env:KEY}, unless a backslash makes it text
OPTION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # of a config group


def harmless(overrides: list[str], schema: Any, folder: Path) -> tuple[list[str], list[str]]:
    """Separate recorded overrides that may be used from those that may not.

    Args:
        overrides: those recorded in `folder`.
        schema: that of the script's config.

    Returns:
        The overrides that may be given to Hydra, and the keys of the others, which have to be given again:
        settings of Hydra's, and keys whose value a resolver would compute.

    Raises:
        UserError: an override is neither Hydra's nor the script's.
    """
    leaves = {*leaf_keys(schema)}
    groups = config_groups()
    keys = leaves | {key.rpartition(".")[0] for key in leaves if "." in key}
    fitting, ignored = [], []
    for text in overrides:
        parsed = _parsed(text, folder)
        key, value = parsed.key_or_group, parsed.value()
        if key.startswith("hydra"):
            if value in CHOICES.get(key, ()) or (key in NUMBERS and type(value) in (int, float)):
                fitting.append(f"{key}={value}")
            elif key not in PLANNED:
                ignored.append(key)
        elif RESOLVER.search(text) and key in keys - groups:
            ignored.append(key)
        elif parsed.is_delete() or not (is_option(value) if key in groups else key in keys):
            raise UserError(f"{folder / RECORD}: {text!r} is nothing that a sweep of this script sets")
        else:
            fitting.append(text)
    return fitting, ignored


def check_jobs(jobs: list[list[str]], schema: Any, folder: Path) -> set[str]:
    """The keys of recorded jobs that have to be given again.

    Raises:
        UserError: an override is not the script's.
    """
    each_once = dict.fromkeys(override for job in jobs for override in job)
    fitting, others = harmless([*each_once], schema, folder)
    for key in (*others, *(each.partition("=")[0] for each in fitting)):
        if key.startswith("hydra"):
            raise UserError(f"{folder / RECORD}: a job sets {key}, which only a command line may")
    return set(others)


def config_groups() -> set[str]:
    """The groups of conf/, such as `model/part`."""
    return {each.relative_to(CONF).as_posix() for each in CONF.rglob("*") if each.is_dir()}


def _parsed(text: str, folder: Path) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(f"{folder / RECORD} is damaged: {text!r} is not an override") from error


def is_option(value: Any) -> bool:
    """Whether a value names an option of a group, or several, and not a file elsewhere."""
    if isinstance(value, ChoiceSweep):
        value = value.list
    values = value if isinstance(value, list) else [value]
    return all(each is None or OPTION.fullmatch(str(each)) for each in values)
