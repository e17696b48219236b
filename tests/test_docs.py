"""README and docs: commands compose, Python examples import what exists, links resolve."""

import ast
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from answer import form_of
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra_errors import one_line
from omegaconf import DictConfig, OmegaConf, open_dict
from scripts import ROOT
from sweeping.launchers import configure_launchers
from sweeping.recorded import SWEEP_KEYS

from llm import config as schemas
from llm.config_rules import validate
from llm.config_values import own_defaults

CONF = ROOT / "conf"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HELP = sorted(CONF.glob("*.yaml"))  # the texts of --help
SCRIPTS = {page.stem for page in HELP} - {"common"}

COMMAND = re.compile(r"(?:\bpython|\btorchrun .*?) (?=experiments/\w+\.py)(.*)")
CODE_SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
KEY = re.compile(r"(?:^| )([a-z_]+)\.(?!jsonl?|pth)([a-z_]+)(?==| |$)")  # not a file's name
TEXT_KEYS = ("prompt", "text", "samples.prompt")  # the scripts quote their values
FILE = re.compile(r"`((?:llm|tests|conf|experiments|docs)/[a-z0-9_/.]+)`")


class Line(NamedTuple):
    number: int
    text: str
    language: str | None  # of the code block that holds the line; None outside of code blocks


class Command(NamedTuple):
    place: str
    typed: str  # experiments/NAME.py and what follows it
    error: str | None  # the line that the page shows as its result


def lines_of(page: Path) -> Iterator[Line]:
    """The lines of a page, those that end in a backslash joined with what follows."""
    language: str | None = None
    begun = ""
    for number, text in enumerate(page.read_text("utf-8").splitlines(), 1):
        if text.startswith("```"):
            language = text[3:].strip() if language is None else None
        elif language is not None and text.endswith("\\"):
            begun += text[:-1]
        else:
            yield Line(number, begun + text, language)
            begun = ""


def commands_of(page: Path) -> Iterator[Command]:
    """The commands in a page's code blocks and code spans, or in a script's help."""
    for line, following in pairwise([*lines_of(page), Line(0, "", None)]):
        if page.suffix == ".yaml":
            shown = [] if line.text.startswith("#") else [re.split(" {3,}", line.text.strip())[0]]
        elif line.language is None:
            shown = CODE_SPAN.findall(line.text)
        else:
            shown = [line.text]
        for each in shown:
            if found := COMMAND.search(each):
                typed = re.split(r" [|>] |\)\"", found[1])[0]  # it may be a part of a pipe, or of eval "$(…)"
                error = following.text if following.text.startswith("error: ") else None
                yield Command(f"{page.relative_to(ROOT)}:{line.number}", typed, error)


def check(typed: str) -> None:
    """Compose a command's config as `--cfg job` does, and check its values; of a sweep, the first job's.

    Raises:
        Exception: what the command would end with.
    """
    path, *arguments = shlex.split(typed, comments=True)
    assert (ROOT / path).exists(), f"there is no {path}"
    given = get_args_parser().parse_args(form_of(arguments)[1])
    if given.shell_completion:
        return
    sweeping = given.multirun or any(argument.startswith("sweep.") for argument in given.overrides)
    overrides = [first_of(argument, sweeping) for argument in given.overrides]
    if any(each.key_or_group == "sweep.resume" for each in overrides):
        others = [each for each in overrides if each.key_or_group != "sweep.resume"]
        assert all(each.key_or_group.startswith(("hydra", "tracking")) for each in others), typed
        overrides = others
    overrides = [each for each in overrides if each.key_or_group not in SWEEP_KEYS]
    choices = [each for each in overrides if (CONF / each.key_or_group).is_dir() or "/" in each.key_or_group]
    config = composed(Path(path).stem, tuple(str(each.input_line) for each in choices)).copy()
    ConfigLoaderImpl._apply_overrides_to_config([each for each in overrides if each not in choices], config)
    with open_dict(config):
        del config["hydra"]
    validate(OmegaConf.to_object(config))


def first_of(argument: str, sweeping: bool) -> Override:
    """An override as a job gets it: the first of several values; free text as a string of Hydra's grammar."""
    key, _, value = argument.partition("=")
    if key in TEXT_KEYS and not sweeping and value[:1] not in ("'", '"'):
        argument = f"{key}='{value}'"
    override = parser().parse_override(argument)
    if not override.is_sweep_override():
        return override
    assert sweeping, f"{argument} is a sweep and needs -m"
    sweep: Any = override.value()
    first = sweep.start if isinstance(sweep, IntervalSweep) else next(override.sweep_string_iterator())
    return parser().parse_override(f"{key}={first}")


@cache
def parser() -> OverridesParser:
    return OverridesParser.create()


@cache  # most commands choose alike, and composing takes a tenth of a second
def composed(script: str, choices: tuple[str, ...]) -> DictConfig:
    schema = schema_of(script)
    for each in schema.__mro__[:-1]:
        name = f"{each.__name__.removesuffix('Config').lower()}_schema"
        ConfigStore.instance().store(name, own_defaults(schema))
    configure_launchers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(script, list(choices), return_hydra_config=True)


def schema_of(script: str) -> Any:
    return getattr(schemas, f"{script.title()}Config", None)  # None: there is no such script


@pytest.mark.parametrize("page", [*PAGES, *HELP], ids=lambda page: page.name)
def test_commands_compose(page: Path) -> None:
    wrong = []
    for place, typed, shown in commands_of(page):
        try:
            check(typed)
        except (Exception, SystemExit) as error:
            line = f"error: {one_line(error, schema_of(Path(typed.split()[0]).stem))}"
            if line != shown:
                wrong.append(f"{place}: {typed}\n    {line}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page: Path) -> None:
    groups: dict[str, set[str]] = {}  # of all scripts: a group has fewer keys in some
    for item in [item for script in SCRIPTS for item in fields(schema_of(script))]:
        if isinstance(item.type, type) and is_dataclass(item.type):
            groups.setdefault(item.name, set()).update(key.name for key in fields(item.type))
    spans = [(line.number, span) for line in lines_of(page) for span in CODE_SPAN.findall(line.text)]
    keys = [(number, *found) for number, span in spans for found in KEY.findall(span)]
    unknown = [key for key in keys if key[1] in groups and key[2] not in groups[key[1]]]
    assert not unknown, [f"{page.name}:{number}: {group}.{key}" for number, group, key in unknown]


def test_commands_are_found() -> None:
    found = [command for page in PAGES for command in commands_of(page)]
    assert {command.typed.split()[0] for command in found} == {f"experiments/{name}.py" for name in SCRIPTS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_import_what_exists(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "llm":
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}: {node.module} has no {name.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    broken = []
    for number, text, language in lines_of(page):
        if language is None:
            targets = [link for link in LINK.findall(text) if not link.startswith("https://")]
            named = FILE.findall(text)
            broken += [f"{page.name}:{number}: {link}" for link in targets if not resolves(link, page)]
            broken += [f"{page.name}:{number}: {file}" for file in named if not (ROOT / file).exists()]
    assert not broken, "\n".join(broken)


def resolves(link: str, page: Path) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


@cache
def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = [line.text for line in lines_of(page) if line.language is None and line.text.startswith("#")]
    plain = [re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 250


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    [extract] = re.findall(r"^test_command=\$\((.*)\)$", script, re.MULTILINE)
    extracted = subprocess.run(["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [line.text for line in lines_of(ROOT / "README.md")]
    assert extracted.splitlines() == [lines[lines.index("<!-- test command -->") + 1]]
    assert extracted.endswith("-m pytest\n")
