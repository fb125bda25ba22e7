# SPDX-License-Identifier: Apache-2.0
"""Errors of one line, and the log of a run: it survives a full disk, threads, and text that no encoding knows."""

import contextlib
import errno
import os
import subprocess
import sys
import threading

import pytest

from dnnlib import Logger, UserError, append_line
from dnnlib.util import LogFile


@pytest.mark.parametrize('text, shown', [('one line', 'one line'), ('a\nb\r\n', r'a\nb\r\n'), ('\x1b[31mred\x00', r'\x1b[31mred\x00'),
                                         ('\ud800é\u2028', r'\ud800é\u2028')])
def test_an_error_is_one_line(text, shown):
    assert UserError(text).message == str(UserError(text)) == shown


def test_a_long_error_is_cut():
    message = UserError('file: ' + 'x' * 10 ** 6).message
    assert len(message) < 4100 and message.startswith('file: xxx') and message.endswith('xxx...')


# --- the log

@contextlib.contextmanager
def logging(path):
    """A Logger, whatever pytest has made of the streams."""
    streams = sys.stdout, sys.stderr
    try:
        with Logger(path) as logger:
            yield logger
    finally:
        assert (sys.stdout, sys.stderr) == streams


@pytest.fixture
def full(monkeypatch):
    """Call it with the number of bytes that the disk still takes, or with None for no limit."""
    room = [None]
    write = os.write

    def limited(fd, data):
        if room[0] is None or fd < 3:
            return write(fd, data)
        if not room[0]:
            raise OSError(errno.ENOSPC, 'No space left on device')
        done = write(fd, data[:room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, 'write', limited)
    return lambda size: room.__setitem__(0, size)


def test_both_streams_go_to_the_file_and_bars_do_not(tmp_path, capsys):
    path = tmp_path / 'log.txt'
    path.write_text('before\n')
    with logging(path) as logger:
        print('out é')
        print('err', file=sys.stderr)
        print('\r 50 %', end='', file=sys.stderr)
        logger.note('for the file alone')
        print('no end', end='', flush=True)
        assert path.read_text() == 'before\nout é\nerr\nfor the file alone\nno end'
    print('after')
    assert path.read_text() == 'before\nout é\nerr\nfor the file alone\nno end'
    out, err = capsys.readouterr()
    assert out == 'out é\nno endafter\n' and err == 'err\n\r 50 %'


def test_text_that_is_no_unicode(tmp_path):
    file = LogFile(tmp_path / 'log.txt')
    file.write('a file \udcff of \ud800\n')
    file.close()
    assert (tmp_path / 'log.txt').read_bytes() == b'a file \\udcff of \\ud800\n'


def test_a_full_disk_delays_the_log(tmp_path, full):
    path = tmp_path / 'log.txt'
    with logging(path) as logger:
        print('first')
        full(4)
        print('second')
        logger.note('third')
        print('fourth', flush=True)
        assert path.read_text() == 'first\nseco'
        full(None)
        print('fifth')
        assert path.read_text() == 'first\nsecond\nthird\nfourth\nfifth\n'


def test_what_is_too_much_to_keep_is_counted(tmp_path, full):
    path, line = tmp_path / 'log.txt', 'x' * 999 + '\n'
    file = LogFile(path)
    full(0)
    for _ in range(2000):
        file.write(line)
    assert os.path.getsize(path) == 0
    full(None)
    file.write('the end\n')
    kept = LogFile.KEPT // 1000
    told = f'\n[{(2000 - kept) * 1000} bytes of output are missing here: No space left on device]\n'
    assert path.read_text() == kept * line + told + 'the end\n'
    file.close()
    file.write('to nowhere\n')
    file.flush()
    assert path.read_text().endswith('the end\n')


def test_a_log_that_never_recovers_ends_quietly(tmp_path, full):
    with logging(tmp_path / 'log.txt'):
        full(0)
        print('lost')
    assert (tmp_path / 'log.txt').read_text() == ''


def test_a_terminal_that_is_gone_leaves_the_log(tmp_path, monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            pass

    monkeypatch.setattr(sys, 'stdout', Gone())
    with logging(tmp_path / 'log.txt'), pytest.raises(BrokenPipeError):
        print('said to nobody')
    assert 'said to nobody' in (tmp_path / 'log.txt').read_text()


def test_threads_write_whole_lines(tmp_path):
    path = tmp_path / 'log.txt'
    file = LogFile(path)

    def say(name):
        for i in range(200):
            file.write(f'{name} {i} {"x" * 50}\n')
            append_line(path, f'{name} {i} beside {"y" * 50}')

    threads = [threading.Thread(target=say, args=(name,)) for name in 'abcd']
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    lines = path.read_text().splitlines()
    expected = [f'{name} {i} {"x" * 50}' for name in 'abcd' for i in range(200)]
    assert sorted(lines) == sorted([*expected, *(line.replace('x' * 50, f'beside {"y" * 50}') for line in expected)])


def test_appending_a_line(tmp_path, full):
    path = tmp_path / 'log.txt'
    assert append_line(path, 'one') and append_line(path, 'two \ud800') and path.read_bytes() == b'one\ntwo \\ud800\n'
    full(0)
    assert not append_line(path, 'three') and not append_line(tmp_path / 'nowhere' / 'log.txt', 'four')
    assert path.read_bytes() == b'one\ntwo \\ud800\n'


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 64 KiB in memory."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if not hasattr(os, 'geteuid') or os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', disk],
                                                                    capture_output=True).returncode:
        pytest.skip('mounting a file system is for root, where that is allowed')
    try:
        filler = disk / 'filler'
        with logging(disk / 'log.txt') as logger:
            print('first')
            with contextlib.suppress(OSError), open(filler, 'wb', 0) as f:
                while True:
                    f.write(bytes(4096))
            lines = [f'line {i} {"x" * 100}' for i in range(200)]
            for line in lines:
                print(line)
            assert not append_line(disk / 'log.txt', 'y' * 10_000)
            filler.unlink()
            logger.note('room again')
        found = (disk / 'log.txt').read_text().splitlines()
        assert found[0] == 'first' and found[-1] == 'room again' and [line for line in found if line.startswith('line ')] == lines
    finally:
        subprocess.run(['umount', disk], check=True)
