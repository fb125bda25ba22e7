# SPDX-License-Identifier: Apache-2.0
"""Progress: one line per minute when the output is not a terminal, a bar when it is."""

import io
import sys

import pytest

from dnnlib.progress import Progress


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_line_a_minute(capsys, clock):
    with Progress(50_000, 'Decoding', clock=clock) as bar:
        for _ in range(1000):
            clock.now += 1 / 32  # 31.25 s in all
            bar.update(10)
        assert capsys.readouterr().out == ''
        clock.now += 28.75
        bar.update(2000)
        assert capsys.readouterr().out == 'Decoding: 12000 of 50000 img (24%), 200 img/s, ETA 3m 10s\n'
        clock.now += 59.5
        bar.update(19_900)
        assert capsys.readouterr().out == ''
        clock.now += 0.5
        bar.update(100)
        bar.update(1)
        assert capsys.readouterr().out == 'Decoding: 32000 of 50000 img (64%), 267 img/s, ETA 1m 08s\n'
    assert capsys.readouterr() == ('', '')


def test_work_on_items_that_are_not_done_prints_lines(capsys, clock):
    with Progress(64, 'Sampling', clock=clock) as bar:
        for _ in range(4):
            clock.now += 60
            bar.advance(8)
        assert capsys.readouterr().out.splitlines()[-1] == 'Sampling: 0 of 64 img (50%), 0.13 img/s, ETA 4m 00s'
        bar.update(32)
        clock.now += 60
        bar.advance(8)
        assert capsys.readouterr().out == 'Sampling: 32 of 64 img (62%), 0.13 img/s, ETA 3m 00s\n'


def test_short_work_and_other_ranks_print_nothing(capsys, clock):
    for show, seconds in ((True, 59), (False, 10_000)):
        with Progress(10, 'Decoding', show=show, clock=clock) as bar:
            clock.now += seconds
            bar.update(5)
    assert capsys.readouterr() == ('', '')


def test_items_are_counted_when_the_loop_is_through_with_them(capsys, clock):
    passed = []
    for item in Progress(4, 'Reading', clock=clock, interval=10).over('abcd'):
        passed.append(item)
        clock.now += 5
    assert passed == [*'abcd']
    told = 'Reading: 2 of 4 img (50%), 0.2 img/s, ETA 10s\nReading: 4 of 4 img (100%), 0.2 img/s, ETA 0s\n'
    assert capsys.readouterr().out == told


def test_what_is_not_known_is_not_told(clock):
    assert Progress(None, 'features').line(2) == 'features: 0 img, 0 img/s'
    assert Progress(0, 'Adding noise').line(0) == 'Adding noise: 0 of 0 img, 0 img/s'
    assert Progress(100, initial=100).line(60) == 'Progress: 100 of 100 img (100%), 0 img/s'
    bar = Progress(300 * 2 ** 20, 'x.pt', 'B', initial=100 * 2 ** 20)
    with bar:
        bar.update(50 * 2 ** 20)
    assert bar.line(100) == 'x.pt: 150 of 300 MiB (50%), 0.5 MiB/s, ETA 5m 00s'
    with Progress(3, 'rank 0') as bar:
        bar.update(0.25)  # the bound counts fractions of images
    assert bar.line(1).startswith('rank 0: 0 of 3 img (8%), 0.25 img/s')


def test_a_terminal_gets_a_bar(monkeypatch, capsys, clock):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', terminal)
    with Progress(4, 'Decoding', interval=0, clock=clock, mininterval=0) as bar:
        bar.update(3)
    assert 'Decoding:  75%' in terminal.getvalue() and '3/4' in terminal.getvalue()
    with Progress(4, 'Decoding', show=False) as bar:
        bar.update(3)
    assert capsys.readouterr().out == '' and terminal.getvalue().count('Decoding') < 10
