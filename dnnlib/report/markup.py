# SPDX-License-Identifier: Apache-2.0
"""Builds HTML that is always escaped: everything not made by tag() is text."""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from dnnlib.util import printable

VOID = ('img', 'input', 'meta')


class Html(str):
    """Text that already is HTML."""


def text(value: Any) -> Html:
    """A value as HTML text; control characters, line ends and bytes that are not UTF-8 are shown as escapes."""
    return value if isinstance(value, Html) else Html(html.escape(printable(str(value)), quote=True))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element: children are Html, or values that are escaped. None and False leave an attribute out, True gives it no value.

    A trailing underscore in an attribute's name is dropped, others become hyphens: class_="a", data_run=0."""
    given = ''.join(f' {key.rstrip("_").replace("_", "-")}' + ('' if value is True else f'="{text(value)}"')
                    for key, value in attributes.items() if value is not None and value is not False)
    return Html(f'<{name}{given}>' if name in VOID else f'<{name}{given}>{join(*children)}</{name}>')


def join(*parts: Any) -> Html:
    """Parts one after the other, escaped where they are not Html."""
    return Html(''.join(map(text, parts)))


def table(head: Sequence, rows: Iterable[Sequence], caption: str | None = None) -> Html:
    """A table that scrolls on its own if the page is too narrow. head: column names; rows: the first cell names the row."""
    lines = [tag('tr', *(tag('th', cell, scope='col') for cell in head))]
    body = [tag('tr', tag('th', first, scope='row'), *(tag('td', cell) for cell in rest)) for first, *rest in rows]
    return tag('div', tag('table', *([tag('caption', caption)] if caption else []), tag('thead', *lines), tag('tbody', *body)),
               class_='scroll')


def json_script(value: Any, ident: str) -> Html:
    """JSON data in a script element that is not executed; escaped so that no value can end the element."""
    data = json.dumps(value, allow_nan=False, separators=(',', ':'))
    for character in '<>&':
        data = data.replace(character, f'\\u{ord(character):04x}')
    return Html(f'<script type="application/json" id="{text(ident)}">{data}</script>')
