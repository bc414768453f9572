"""Writes YAML that `model.program.reading` reads back equal."""

from __future__ import annotations

from typing import Any

import yaml

from model.program.reading import UnreadableError, parse_yaml


def to_yaml(value: Any) -> str:
    """A value as YAML text, which `model.program.reading.parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


class _Dumper(yaml.SafeDumper):
    """PyYAML's, with quotation marks also around texts that only our reader takes for another value, such as 1e5."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        try:
            is_text = isinstance(parse_yaml(text), str)
        except UnreadableError:
            is_text = True  # PyYAML knows
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_text else "'")

    def ignore_aliases(self, data: Any) -> bool:
        """Whether a value that comes twice is written twice."""
        return True


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(tuple, _Dumper.represent_list)
