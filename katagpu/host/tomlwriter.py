"""TOML of values that were read from TOML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from katagpu.host.tomlreader import BARE


def dumps(values: Mapping[str, Any]) -> str:
    """The document: single values first, then tables, each under its whole name."""
    return "\n".join(_table(values, "")).strip("\n") + "\n"


def _table(values: Mapping[str, Any], name: str) -> Iterator[str]:
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    arrays = {key: value for key, value in values.items()
              if isinstance(value, list) and value and all(isinstance(one, Mapping)
                                                           for one in value)}
    for key, value in values.items():
        if key not in tables and key not in arrays:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in tables.items():
        inner = f"{name}.{_key(key)}" if name else _key(key)
        yield ""
        yield f"[{inner}]"
        yield from _table(value, inner)
    for key, value in arrays.items():
        inner = f"{name}.{_key(key)}" if name else _key(key)
        for one in value:
            yield ""
            yield f"[[{inner}]]"
            yield from _table(one, inner)


def _key(key: str) -> str:
    return key if BARE.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but DEL, which JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {_value(one)}' for key, one in value.items())}}}"
    return str(value)  # a date: read by tomllib, written as it is
