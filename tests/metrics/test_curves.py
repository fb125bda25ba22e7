# SPDX-License-Identifier: Apache-2.0
"""Plots of many results: axes, curves and their labels, error bars, the best value."""

import importlib.util

import pytest

from dnnlib import UserError
from metrics import curves, table

DRAWS = pytest.mark.skipif(importlib.util.find_spec('matplotlib') is None, reason='drawing needs the package matplotlib')
FACTS = {'network': 'runs/a', 'sha256': 'ab' * 32, 'weights': 'ema', 'sampler': 'heun', 'levels': 'edm', 'steps': 18, 'evaluations': 35,
         'guidance': 1.0}


def result(value=1.0, parts=(), **facts):
    return {'fid_score': value, 'num_images': 2000, 'detector': {'name': 'inception'}, 'reference': {'split': 'train', 'sha256': '12' * 32},
            'generated': {**FACTS, **facts}, **dict(parts)}


def many(**axes):
    """A result of each combination of values of two axes."""
    (one, first), (other, second) = axes.items()
    return [result(**{one: a, other: b}) for a in first for b in second]


def drawn(results):
    """{label: places on the axis}."""
    across = curves.choose_axis(results)
    return {curve.label: [curves.place(each, across) for each in curve.results] for curve in curves.group(results, across)}


def test_to_the_right_is_what_has_most_values():
    assert curves.choose_axis(many(steps=[5, 9, 18], guidance=[1, 2])) == curves.STEPS
    assert curves.choose_axis(many(steps=[9, 18], guidance=[1, 2])) == curves.STEPS
    assert curves.choose_axis(many(steps=[9, 18], guidance=[1, 1.5, 2])) == curves.GUIDANCE
    assert curves.choose_axis(many(steps=[9, 18], weights=['ema:0.05', 'ema:0.1', 'ema:0.15'])) == curves.LENGTH
    assert curves.choose_axis(many(steps=[9], weights=['ema', 'raw'])) == curves.STEPS
    assert curves.choose_axis(many(steps=[9, 18], sampler=['heun', 'ddim'])) == curves.EVALUATIONS
    assert curves.choose_axis(many(steps=[9, 18], sampler=['heun', 'ddim']) + [result(evaluations=None)]) == curves.STEPS


def test_a_curve_is_what_is_alike_but_for_the_axis():
    assert drawn(many(guidance=[1, 1.5], steps=[18, 5, 9])) == {'guidance 1': [5, 9, 18], 'guidance 1.5': [5, 9, 18]}
    assert drawn(many(sampler=['heun'], steps=[5, 9])) == {'': [5, 9]}
    weights = [result(steps=steps, weights=weights) for steps in (5, 9) for weights in ('ema', 'raw')]
    assert drawn(weights) == {'ema': [5, 9], 'raw': [5, 9]}
    networks = [result(steps=steps, network=network, sha256=network) for steps in (5, 9) for network in ('x/a', 'x/b')]
    assert drawn(networks) == {'a': [5, 9], 'b': [5, 9]}
    levels = [result(steps=steps, levels=levels) for steps in (5, 9) for levels in ('edm', 'edm:rho=5')]
    assert drawn(levels) == {'levels edm': [5, 9], 'levels edm:rho=5': [5, 9]}


def test_weight_1_is_on_every_curve_of_guidance():
    """It is the same with every interval, and with none."""
    plain = [result(steps=steps) for steps in (9, 18)]
    led = [result(steps=steps, guidance=weight, guidance_interval=interval)
           for steps in (9, 18) for weight in (1.5, 2) for interval in (None, [0.3, 5.0])]
    expected = {f'guided at {where}, {steps} steps': [1.0, 1.5, 2] for where in ('all levels', '(0.3, 5.0]') for steps in (9, 18)}
    assert drawn(plain + led) == expected
    only = [each for each in plain + led if each['generated'].get('guidance_interval') or each['generated']['guidance'] == 1]
    assert drawn(only) == {f'{steps} steps': [1.0, 1.5, 2] for steps in (9, 18)}
    assert drawn(plain + led[:1] + [result(steps=9, guidance=3), result(steps=9, guidance=4)]) == {
        '9 steps': [1.0, 1.5, 3, 4], '18 steps': [1.0]}


def test_colours_follow_guidance_and_dashes_the_rest():
    results = [result(steps=steps, guidance=weight, sampler=sampler) for steps in (5, 9) for weight in (1, 2)
               for sampler in ('ddim', 'heun')]
    found = {curve.label: (curve.shade, curve.style) for curve in curves.group(table.in_order(results), curves.EVALUATIONS)}
    assert found == {'guidance 1, ddim': (0, 0), 'guidance 2, ddim': (1, 0), 'guidance 1, heun': (0, 1), 'guidance 2, heun': (1, 1)}


def test_bars():
    """An interval, else the deviation of repeats, else none."""
    interval = {'intervals': {'fid_score': {'low': 0.5, 'high': 2.5, 'level': 0.95, 'method': 'm'}}}
    repeats = {'repeats': [{}, {}, {}], 'summary': {'fid_score': {'mean': 1.0, 'std': 0.25, 'min': 0.7}}}
    assert curves.error_bar(result(1.0, interval), 'fid_score') == (0.5, 1.5, '95% interval')
    assert curves.error_bar(result(1.0, repeats), 'fid_score') == (0.25, 0.25, 'standard deviation of 3 repeats')
    nothing = {'intervals': {'fid_score': {'low': None, 'high': None, 'level': 0.95, 'method': 'too few images'}}}
    assert curves.error_bar(result(1.0, nothing), 'fid_score') == curves.error_bar(result(1.0), 'fid_score') == (0.0, 0.0, None)


def test_names_of_ticks_do_not_overlap():
    assert curves.apart([5, 9, 18], float) == [5, 9, 18] and curves.apart([7], float) == [7]
    assert curves.apart([1, 50, 52, 100], float) == [1, 50, 100]


def test_the_best_of_what_compares():
    found = [result(2.0, {'precision': 0.5}, steps=9), result(1.0, {'precision': 0.6, 'kid_std': 0.1}, steps=18)]
    columns, rows = table.lay_out(found)
    assert {columns[i]: value for i, value in table.best(columns, rows).items()} == {'fid_score': 1.0, 'precision': 0.6}
    assert table.markdown(columns, rows).count('**') == 4
    for parts in ({'num_images': 1000}, {'detector': {'name': 'pixels'}}, {'reference': {'sha256': '34' * 32}}):
        assert not table.best(*table.lay_out([*found, result(0.5, parts)]))
    assert not table.best(*table.lay_out(found[:1]))


@DRAWS
def test_a_picture_of_everything(tmp_path):
    """Panels for numbers alone, values that are missing, far apart, negative; the same bytes in whatever order."""
    results = many(steps=[5, 9, 18], guidance=[1, 1.5]) + [result(300.0, {'kid': -0.001, 'inception_score': None}, steps=36)]
    curves.draw(results, tmp_path / 'a.png', 'x')
    curves.draw(results[::-1], tmp_path / 'b.png', 'x')
    assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()


def test_nothing_to_draw(tmp_path):
    images = result(parts={'generated': {'path': 'out', 'sha256': 'ab'}})
    for found, words in (([images], '1 results 0 have'), ([result(None)], '1 results 1 have'), ([result(float('inf'))], '1 results 1'),
                         ([result(guidance=float('nan'))], '1 results 0 have')):
        with pytest.raises(UserError, match=f'p.png: nothing to draw: of {words}'):
            curves.draw(found, tmp_path / 'p.png', 'x')
    assert not list(tmp_path.iterdir())
