"""YAML out, by ruamel.yaml's dumper: mappings as blocks, lists on one line, text in ASCII."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode, SequenceNode
from ruamel.yaml.representer import RoundTripRepresenter, SafeRepresenter
from ruamel.yaml.resolver import implicit_resolvers

from slimheads.strict_yaml import CoreSchema

_PLAIN = re.compile(r"[A-Za-z./][\w./@+-]*(://[\w./@+-]+)?", re.ASCII)


class _EverySchema(CoreSchema):
    """Takes for a number, a date and so on what any version of YAML does: text that looks like one is quoted."""


for _, _tag, _pattern, _first in implicit_resolvers:
    _EverySchema.add_implicit_resolver_base(_tag, _pattern, _first)


class _Representer(RoundTripRepresenter):
    def represent_text(self, text: str) -> ScalarNode:
        """Quoted unless it is clearly plain: ruamel writes `[a?b]` as it is, which readers of YAML 1.1 refuse."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if _PLAIN.fullmatch(text) else '"')

    def represent_flow(self, data: list[Any] | tuple[Any, ...]) -> SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Representer.add_representer(str, _Representer.represent_text)
_Representer.add_representer(list, _Representer.represent_flow)
_Representer.add_representer(tuple, _Representer.represent_flow)
_Representer.add_representer(type(None), SafeRepresenter.represent_none)  # the word null, not nothing


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Plain data, or a ruamel `CommentedMap` of it, as YAML that `strict_yaml` reads back equal."""
    yaml = YAML()
    yaml.Resolver, yaml.Representer = _EverySchema, _Representer
    yaml.width, yaml.allow_unicode = sys.maxsize, False
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue()
