# SPDX-License-Identifier: Apache-2.0
"""Turns "min_snr:gamma=5" into the object that a registry names, or into a one-line error that lists the choices.

A registry is a plain dict. Its values are classes, which are instantiated, or functions, which are partially applied. Every parameter
with a default is an option for the user, unless the default is itself a function. The others are given by the caller."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from dnnlib import UserError


def parse(spec: str) -> tuple[str, dict]:
    """"name:key=value,key=value" -> (name, {key: value}); values are int, float, bool, None or str, in that order of preference."""
    name, _, rest = str(spec).partition(':')
    return name.strip(), {key: _literal(value) for key, value in split(rest, f'"{spec}": expected key=value after "{name}:"').items()}


def split(text: str, where: str) -> dict[str, str]:
    """"key=value,key=value" -> {key: value} as text. Raises UserError that begins with `where`."""
    options = {}
    for item in filter(None, text.split(',')):
        key, equals, value = item.partition('=')
        if not equals or not key.strip():
            raise UserError(f'{where}, got "{item}"')
        options[key.strip()] = value.strip()
    return options


def unparse(name: str, options: dict) -> str:
    """The inverse of parse(): ("name", {"key": value}) -> "name:key=value"; lists as a|b|c."""
    text = lambda value: '|'.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return name + ''.join(f'{"," if i else ":"}{key}={text(value)}' for i, (key, value) in enumerate(options.items()))


def _literal(text):
    words = {'true': True, 'false': False, 'none': None}
    if text.lower() in words:
        return words[text.lower()]
    return parse_number(text)


def parse_number(text: str) -> int | float | str:
    """The int or float that a text represents, otherwise the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def build(spec: str, registry: dict, slot: str = 'option', **context: Any) -> Any:
    """The object that `spec` names in `registry`.

    spec: "name" or "name:key=value,...". slot: its name in errors, such as "--weight".
    context: values passed to any entry that has such a parameter, unless the spec gives one (sigma_data, for example).
    Raises UserError for unknown names, unknown keys and values that the entry refuses (ValueError, TypeError)."""
    piece, options = _resolve(spec, registry, slot)
    taken = inspect.signature(piece).parameters
    kwargs = {key: value for key, value in context.items() if key in taken} | options
    try:
        return piece(**kwargs) if inspect.isclass(piece) else functools.partial(piece, **kwargs)
    except (ValueError, TypeError) as err:
        raise UserError(f'{slot}={spec}: {err}') from None


def check(spec: str, registry: dict, slot: str = 'option') -> None:
    """Refuses what build() would refuse, as far as that is known without the caller's context."""
    piece, _ = _resolve(spec, registry, slot)
    needed = [p for p in inspect.signature(piece).parameters.values() if p.default is p.empty]
    if not (inspect.isclass(piece) and needed):
        build(spec, registry, slot)


def _resolve(spec, registry, slot):
    """(entry, its options in the types of their defaults) that a spec names."""
    name, options = parse(spec)
    if name not in registry:
        raise UserError(f'{slot}={spec}: unknown name "{name}"; choose from {", ".join(registry)}')
    return registry[name], check_options(name, registry[name], options, f'{slot}={spec}')


def check_options(name: str, piece: Callable, options: dict, where: str) -> dict:
    """{key: value} in the types of the entry's defaults; the values may be text. Raises UserError that begins with `where`."""
    accepted = parameters(piece)
    for key in options:
        if key not in accepted:
            allowed = ', '.join(f'{k}={_shown(v)}' for k, v in accepted.items()) or 'no keys'
            raise UserError(f'{where}: "{name}" has no key "{key}"; it takes {allowed}')
    literal = lambda value: _literal(value) if isinstance(value, str) else value
    return {key: _checked(accepted[key], key, literal(value), where) for key, value in options.items()}


def parameters(piece: Callable) -> dict:
    """{name: default} of the options of a registry entry."""
    found = inspect.signature(piece).parameters.values()
    return {p.name: p.default for p in found if p.default is not p.empty and not callable(p.default)}


def find(path: str) -> dict:
    """The registry that "package.module:NAME" names, imported only now, so that --help need not wait for torch."""
    module, _, name = path.partition(':')
    return getattr(importlib.import_module(module), name)


def listing(registry: dict) -> list[tuple[str, str, dict[str, str]]]:
    """[(name, description, {key: default as text})] of a registry; description: the attribute `what` of a piece, or the first paragraph of
    its docstring."""
    found = []
    for name, piece in registry.items():
        text = getattr(piece, 'what', None) or inspect.getdoc(getattr(piece, 'network', piece)) or ''
        keys = {key: str(_shown(value)) for key, value in parameters(piece).items()} if callable(piece) else {}
        found.append((name, ' '.join(text.split('\n\n')[0].split()), keys))
    return found


def load_all(package: ModuleType) -> None:
    """Imports every file of a package, which adds its entries to their registries: a new file needs no other edit."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f'{package.__name__}.{module.name}')


def _checked(default, key, value, where):
    """The value in the type of the default; wrong types, such as "steps=abc", are refused before anything runs."""
    if isinstance(default, (list, tuple)):
        return _numbers(default, key, value, where)
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    if number and (isinstance(value, (str, bool)) or value is None):
        raise UserError(f'{where}: "{key}" must be a number, got "{value}"')
    if isinstance(default, int) and number and isinstance(value, float):
        raise UserError(f'{where}: "{key}" must be a whole number, got "{value}"')
    if isinstance(default, bool) and not isinstance(value, bool):
        raise UserError(f'{where}: "{key}" must be true or false, got "{value}"')
    if isinstance(default, str) and not isinstance(value, str):
        raise UserError(f'{where}: "{key}" must be a word, got "{value}"')
    return value


def _numbers(default, key, value, where):
    """1|2|2 -> [1, 2, 2]; only whole numbers if the default has only those."""
    found = [_literal(item) for item in str(value).split('|')]
    if any(isinstance(item, (bool, str)) or item is None for item in found):
        raise UserError(f'{where}: "{key}" must be numbers with | between them, such as 1|2|2, got "{value}"')
    if all(isinstance(item, int) for item in default) and any(isinstance(item, float) for item in found):
        raise UserError(f'{where}: "{key}" must be whole numbers with | between them, such as 1|2|2, got "{value}"')
    return found


def _shown(default):
    return '|'.join(map(str, default)) if isinstance(default, (list, tuple)) else default
