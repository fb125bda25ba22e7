# SPDX-License-Identifier: Apache-2.0
""""name:key=value" specifications: what they build, and the one line that says why they cannot."""

import functools
import math

import click
import click.testing
import pytest

from dnnlib import UserError
from torch_utils import registry
from torch_utils.command_line import Command, Spec
from training.data.pairs import PAIRINGS
from training.diffusion.noise import NOISE
from training.objective.penalty import PENALTIES
from training.objective.weighting import WEIGHTS
from training.run.optimizer import LR_SCHEDULES, OPTIMIZERS


class Piece:
    """A piece with one option of each kind."""

    def __init__(self, number=1.5, count=3, flag=False, word='plain'):
        if number < 0:
            raise ValueError(f'number={number} must be 0 or more')
        self.options = (number, count, flag, word)


def power(x, exponent=2.0, sigma_data=0.5):
    return sigma_data * x ** exponent


def listed(x, multiples=(1, 2.0), factor=1, rule=math.hypot, *, batch):
    """A piece with a list, a default that is a function, and a parameter that only the caller gives."""
    return [rule(x, factor * m) for m in multiples], batch


PIECES = {'piece': Piece, 'power': power, 'listed': listed}


def build(spec, **context):
    return registry.build(spec, PIECES, '--slot', **context)


def test_text_becomes_values_of_the_narrowest_kind():
    name, options = registry.parse('name: a=1, b=-2.5, c=1e-3, d=True, e=none, f=word, g=inf')
    assert name == 'name' and options == {'a': 1, 'b': -2.5, 'c': 1e-3, 'd': True, 'e': None, 'f': 'word', 'g': float('inf')}
    assert isinstance(options['a'], int) and options['d'] is True
    assert registry.parse('bare') == ('bare', {}) and registry.parse('bare:') == ('bare', {})


def test_classes_are_instantiated():
    assert build('piece').options == (1.5, 3, False, 'plain')
    assert build('piece:number=2,count=7,flag=true,word=odd').options == (2, 7, True, 'odd')


def test_functions_are_applied_in_part():
    assert build('power')(3.0) == 4.5
    made = build('power:exponent=3')
    assert isinstance(made, functools.partial) and made(2.0) == 4.0


def test_context_reaches_the_pieces_that_take_it_unless_told_otherwise():
    assert build('power', sigma_data=2.0, unheard_of=1)(3.0) == 18.0
    assert build('power:sigma_data=1', sigma_data=2.0)(3.0) == 9.0
    assert build('piece', sigma_data=2.0).options == (1.5, 3, False, 'plain')


def test_parameters_without_a_default_are_given_by_the_caller_and_are_no_keys():
    """Nor are those whose default is a function: the text cannot say one. The caller may give such a parameter."""
    assert registry.parameters(listed) == {'multiples': (1, 2), 'factor': 1}
    assert build('listed', batch=64)(0) == ([1, 2], 64)
    assert build('listed:factor=3', batch=64, rule=max, x=5)() == ([5, 6], 64)
    with pytest.raises(TypeError):  # the piece is a function: what nobody gave is missed when it is called
        build('listed')(0)


def test_a_class_that_is_not_given_what_it_needs_is_refused():
    class Needy:
        def __init__(self, batch, count=1):
            pass

    with pytest.raises(UserError, match="--slot=needy: .*'batch'"):
        registry.build('needy', {'needy': Needy}, '--slot')


def test_lists_are_written_with_bars():
    for text, values in [('1|2|2', [1, 2, 2]), ('3', [3]), ('0.5|1e1', [0.5, 10.0]), ('1 | 4', [1, 4])]:
        assert build(f'listed:multiples={text}', batch=0).keywords['multiples'] == values


@pytest.mark.parametrize('spec', ['bare', 'name:a=1', 'name:a=1,b=-2.5,c=True,d=None,e=word,f=1e-07', 'arch:cres=1|2|2,attn=16'])
def test_unparse_is_the_inverse_of_parse(spec):
    assert registry.unparse(*registry.parse(spec)) == spec


@pytest.mark.parametrize('options', [{}, {'a': 1, 'b': 0.1 + 0.2, 'c': False, 'd': None, 'e': 'word', 'f': float('inf'), 'g': 5e-324}])
def test_parse_is_the_inverse_of_unparse(options):
    assert registry.parse(registry.unparse('name', options)) == ('name', options)


def test_lists_go_through_text_to_the_piece():
    for values in ([1, 2, 2], (4,), [0.25, 3]):
        spec = registry.unparse('listed', {'multiples': values, 'factor': 2})
        assert build(spec, batch=0).keywords == dict(multiples=list(values), factor=2, batch=0)


@pytest.mark.parametrize('spec, text', [
    ('peace', 'unknown name "peace"; choose from piece, power, listed'),
    ('', 'unknown name ""; choose from piece, power, listed'),
    ('piece:numer=1', '"piece" has no key "numer"; it takes number=1.5, count=3, flag=False, word=plain'),
    ('power:x=1', '"power" has no key "x"; it takes exponent=2.0, sigma_data=0.5'),
    ('piece:number=many', '"number" must be a number, got "many"'),
    ('piece:number=true', '"number" must be a number, got "True"'),
    ('piece:number=none', '"number" must be a number, got "None"'),
    ('piece:count=1.5', '"count" must be a whole number, got "1.5"'),
    ('piece:flag=1', '"flag" must be true or false, got "1"'),
    ('piece:word=3', '"word" must be a word, got "3"'),
    ('piece:number=-1', 'number=-1 must be 0 or more'),
    ('listed:multiples=1|two', '"multiples" must be numbers with | between them, such as 1|2|2, got "1|two"'),
    ('listed:multiples=1|true', '"multiples" must be numbers with | between them, such as 1|2|2, got "1|true"'),
    ('listed:multiples=none', '"multiples" must be numbers with | between them, such as 1|2|2, got "None"'),
    ('listed:factor=1|2', '"factor" must be a number, got "1|2"'),
    ('listed:batch=3', '"listed" has no key "batch"; it takes multiples=1|2.0, factor=1'),
    ('listed:rule=max', '"listed" has no key "rule"; it takes multiples=1|2.0, factor=1')])
def test_mistakes_are_one_line_that_names_slot_and_choices(spec, text):
    with pytest.raises(UserError) as err:
        build(spec)
    assert err.value.message == f'--slot={spec}: {text}'


@pytest.mark.parametrize('spec', ['piece:number', 'piece:=3', 'piece:number=1,count'])
def test_items_without_key_or_value_are_refused(spec):
    with pytest.raises(UserError, match='expected key=value after "piece:"'):
        build(spec)


def test_the_option_type_checks_at_once_and_hands_the_text_on():
    @click.command(cls=Command)
    @click.option('--slot', type=Spec(PIECES), default='piece')
    def command(slot):
        click.echo(f'<{slot}>')

    run = lambda *args: click.testing.CliRunner().invoke(command, args)
    assert run('--slot=power:exponent=3').output == '<power:exponent=3>\n'
    wrong = run('--slot=cube')
    assert wrong.exit_code == 1 and 'Error: --slot=cube: unknown name "cube"; choose from piece, power, listed' in wrong.output
    assert '--slot NAME[:k=v]' in run('--help').output
    assert all(name in run('--slot=help').output for name in PIECES) and run('--slot=help').exit_code == 0


def test_every_registry_builds_its_pieces_by_name():
    for pieces in (LR_SCHEDULES, NOISE, OPTIMIZERS, PAIRINGS, PENALTIES, WEIGHTS):
        assert list(pieces) == sorted(pieces)
        for name, piece in pieces.items():
            made = registry.build(name, pieces)
            assert isinstance(made, piece) if isinstance(piece, type) else made.func is piece
