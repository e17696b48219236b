"""The values of overrides, for comparison: equal however they are spelled; and the values of keys that a job
does not set."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from sweeping.recorded import config_groups

from llm.config_values import own_defaults
from llm.overrides import as_override, split_override
from llm.sweeps.jobs import as_text, recorded_texts

MEANS_ITSELF = re.compile(r"[\w.+-]+|\[[\w.,+ -]*\]", re.ASCII)  # needs no quotes in an override


@dataclass(frozen=True)
class Values:
    schema: Any  # that of the script's config
    compose: Callable[[list[str]], DictConfig | None]  # composes a job's config; None if that fails
    recorded: Path | None = None  # the folder of the sweep that is extended
    _known: dict[str, str] = field(default_factory=dict)  # by override
    _composed: dict[tuple[str, ...], DictConfig | None] = field(default_factory=dict)  # by chosen options

    def of(self, override: str) -> str:
        """A text that is equal for overrides that give a key the same value."""
        if override not in self._known:
            self._known[override] = self._value(override)
        return self._known[override]

    def _value(self, override: str) -> str:
        parsed = self._parser.parse_override(override)
        value: Any = parsed.value()
        try:  # in the type of the key: 1 and 1.0 are the same rate, and 1 and true the same switch
            OmegaConf.update(self._typed, parsed.key_or_group, value)
            value = OmegaConf.select(self._typed, parsed.key_or_group)
        except OmegaConfBaseException:  # an option of a group, or a value that does not fit
            pass
        plain = OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value
        return json.dumps(plain, default=str)

    def default(self, number: int, setting: list[str], key: str) -> str | None:
        """The override for the value that a key has in a job that does not set it: the value with which a job
        of the extended sweep was trained, or else today's default; None if there is none."""
        trained = recorded_texts(self.recorded / str(number), [key]) if self.recorded else {}
        if key in trained and "${" not in trained[key]:
            return _as_override(key, trained[key])
        choices = tuple(each for each in setting if split_override(each)[0] in self._groups)
        if choices not in self._composed:
            self._composed[choices] = self.compose(list(choices))
        config = self._composed[choices]
        if config is None:
            return None
        if key in self._groups:
            chosen = config.hydra.runtime.choices.get(key)
            return f"{key}={as_text(chosen)}"
        try:
            value = OmegaConf.select(config, key)
        except OmegaConfBaseException:
            return None
        return _as_override(key, as_text(OmegaConf.to_object(value) if OmegaConf.is_config(value) else value))

    @cached_property
    def _parser(self) -> OverridesParser:
        return OverridesParser.create()

    @cached_property
    def _groups(self) -> set[str]:
        return config_groups()

    @cached_property
    def _typed(self) -> DictConfig:
        return OmegaConf.structured(own_defaults(self.schema))


def _as_override(key: str, text: str) -> str:
    return f"{key}={text}" if MEANS_ITSELF.fullmatch(text) else as_override(key, text)
