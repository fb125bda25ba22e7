# SPDX-License-Identifier: Apache-2.0
"""HTML that escapes what it is given."""

import html
import json
import re

import pytest

from dnnlib.report.markup import Html, join, json_script, table, tag, text

EVIL = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onload='x", '</script><b>', '&lt;b&gt;', '<!--', ']]>']


@pytest.mark.parametrize('value', EVIL)
def test_text_and_attributes_are_escaped(value):
    made = tag('p', value, title=value)
    match = re.fullmatch(r'<p title="([^"<>]*)">([^<>]*)</p>', made)
    assert match and [html.unescape(part) for part in match.groups()] == [value, value]


def test_html_is_not_escaped_twice():
    assert tag('p', tag('b', 'a < b'), Html('<i>x</i>')) == '<p><b>a &lt; b</b><i>x</i></p>'
    assert join('<', tag('img', alt='"')) == '&lt;<img alt="&quot;">'


def test_attributes():
    assert tag('input', class_='a', data_run=0, checked=True, disabled=False, name=None) == '<input class="a" data-run="0" checked>'


def test_what_cannot_be_printed_is_shown_as_an_escape():
    assert text('a\nb\u202ec\udc80') == 'a\\nb\\u202ec\\udc80'
    text('a\udc80').encode('utf-8')


@pytest.mark.parametrize('value', [*EVIL, '\u2028', 'é'])
def test_json_ends_no_element_and_comes_back(value):
    made = json_script({value: [value, 1.5]}, 'data')
    body = re.fullmatch(r'<script type="application/json" id="data">([^<>&]*)</script>', made)[1]
    assert json.loads(body) == {value: [value, 1.5]}


def test_table():
    made = table(['a', '<b>'], [('x', 1)])
    assert made.count('<th scope="col">') == 2 and '&lt;b&gt;' in made and '<th scope="row">x</th><td>1</td>' in made
