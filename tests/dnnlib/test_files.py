# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or not there, JSON without nan, digests, and where results go."""

import hashlib
import json
import os

import numpy as np
import pytest

from dnnlib import UserError, files, one_line


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / 'a'
    for text in ('first', 'second'):
        with files.replacing(path) as part:
            assert os.path.basename(part).startswith('.') and os.path.dirname(part) == str(tmp_path)
            with open(part, 'w') as f:
                f.write(text)
        assert path.read_text() == text
    with pytest.raises(RuntimeError), files.replacing(path) as part:
        open(part, 'w').close()
        raise RuntimeError
    assert path.read_text() == 'second' and os.listdir(tmp_path) == ['a']


def fill(dest, text, **options):
    with files.new_folder(dest, **options) as part:
        assert os.path.basename(part).startswith('.') and os.path.dirname(part) == str(dest.parent)
        with open(os.path.join(part, 'file'), 'w') as f:
            f.write(text)
        if text == 'bad':
            raise RuntimeError


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    dest = tmp_path / 'net'
    fill(dest, 'first')
    assert os.stat(dest).st_mode & 0o777 == 0o777 & ~umask()
    with pytest.raises(UserError, match='net exists; choose a new name'):
        fill(dest, 'second')
    with pytest.raises(RuntimeError):
        fill(dest, 'bad', over='anything')
    assert (dest / 'file').read_text() == 'first' and os.listdir(tmp_path) == ['net']
    fill(dest, 'second', over='anything')
    assert (dest / 'file').read_text() == 'second' and os.listdir(tmp_path) == ['net']


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_takes_the_place_of_an_empty_one_alone(tmp_path):
    (tmp_path / 'there').mkdir()
    with pytest.raises(UserError):
        fill(tmp_path / 'there', 'text')
    fill(tmp_path / 'there', 'text', over='empty')
    with pytest.raises(OSError, match='not empty'):
        fill(tmp_path / 'there', 'other', over='empty')
    assert (tmp_path / 'there' / 'file').read_text() == 'text' and os.listdir(tmp_path) == ['there']


def test_a_replacement_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    fill(tmp_path / 'net', 'first')
    rename = os.rename

    def fails(source, dest):
        if '-part-' in source:
            raise OSError('disk')
        rename(source, dest)

    monkeypatch.setattr(os, 'rename', fails)
    with pytest.raises(OSError, match='disk'):
        fill(tmp_path / 'net', 'second', over='anything')
    assert (tmp_path / 'net' / 'file').read_text() == 'first' and os.listdir(tmp_path) == ['net']


def test_json_has_no_nan(tmp_path):
    path = tmp_path / 'r.json'
    value = {'a': float('nan'), 'b': [np.float64(2.5), float('inf')], 'c': (1, {'d': None})}
    files.write_json(path, value, null=True)
    assert json.loads(path.read_text()) == files.read_json(path) == {'a': None, 'b': [2.5, None], 'c': [1, {'d': None}]}
    assert path.read_text().startswith('{\n  "a"') and path.read_text().endswith('}\n')
    with pytest.raises(ValueError, match='JSON compliant'):
        files.write_json(path, value)
    assert files.read_json(path)['a'] is None and os.listdir(tmp_path) == ['r.json']


@pytest.mark.parametrize('content, message', [(b'{', 'not a JSON file'), (b'\xff', 'not a JSON file'), (b'[1]', 'object, got list'),
                                              (None, 'No such file'), (b'[' * 200_000, 'nested too deeply'),
                                              (b'9' * 5000, 'not a JSON file'),
                                              (b'{"a":' * 9999 + b'1' + b'}' * 9999, 'nested too deeply'), (b'', 'not a JSON file')])
def test_what_is_no_json_object_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / 'x.json').write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        files.read_json(tmp_path / 'x.json')
    assert error.value.message.startswith(f'{tmp_path / "x.json"}: ') and '\n' not in error.value.message


def test_json_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    with open(tmp_path / 'x.json', 'wb') as f:
        f.truncate(files.MAX_JSON + 1)  # no bytes on the disk
    with pytest.raises(UserError, match=f'x.json: larger than the limit of {files.MAX_JSON} bytes for JSON'):
        files.read_json(tmp_path / 'x.json')
    monkeypatch.setattr(files, 'MAX_JSON', 5)
    assert files.json_value(b'[1,2]', 'x') == [1, 2]
    with pytest.raises(UserError, match='x: larger than'):
        files.json_value(b'[1, 2]', 'x')


def test_digests(tmp_path):
    (tmp_path / 'a').write_bytes(b'content')
    assert files.file_digest(tmp_path / 'a') == hashlib.sha256(b'content').hexdigest()


def test_the_digest_of_a_folder_is_that_of_its_names_and_contents(tmp_path):
    """Whatever the order of writing, the times, the place and what is under way; every name and byte counts."""
    def fill(folder, names, contents=str):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(contents(name))
        return files.file_digest(folder)

    names = ['b.png', 'a.png', '000/c.png']
    found = fill(tmp_path / 'one', names)
    expected = hashlib.sha256(b''.join(name.encode() + b'\0' + hashlib.sha256(name.encode()).digest() for name in sorted(names)))
    assert found == expected.hexdigest() == fill(tmp_path / 'two', names[::-1])
    assert found == fill(tmp_path / 'one', ['.b.png.4711', '000/.lock', '.hidden/x', '__MACOSX/x'])
    assert found != fill(tmp_path / 'three', [*names, 'd.png'])
    assert found != fill(tmp_path / 'four', ['b.png', 'a.png', '001/c.png'], lambda name: name.replace('001', '000'))
    assert found != fill(tmp_path / 'five', names, lambda name: name.replace('c', 'x'))


def test_where_results_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    assert files.beside('out', '.fid.json') == str(tmp_path / 'out.fid.json')
    assert files.beside('owner/name', '.fid.json') == 'owner--name.fid.json'
    files.prepare_output('new/deep/r.json', '--out-path', '.json')
    assert os.listdir('new/deep') == []
    for path, message in (('out', 'is a folder, expected the name of a file$'),
                          ('r.txt', 'expected the name of a file that ends in .json')):
        with pytest.raises(UserError, match=f'--out-path={path}: {message}'):
            files.prepare_output(path, '--out-path', '' if path == 'out' else '.json')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='--out-path=file/r.json: the folder .* is not writable'):
        files.prepare_output('file/r.json', '--out-path')


def test_a_mistake_of_the_user_is_one_line_whatever_it_names():
    assert UserError('é ü "x" 10 µm').message == 'é ü "x" 10 µm'
    found = UserError('a\nb\r\x1b[31m\x00\ud800\u202e').message
    assert found == 'a\\nb\\r\\x1b[31m\\x00\\ud800\\u202e' == str(UserError(found))
    assert len(UserError('x' * 10 ** 6).message) < 5000


def test_errors_in_one_line():
    assert one_line(ValueError('\n first \nsecond')) == 'first ' and one_line(ValueError('first\nsecond'), last=True) == 'second'
    assert one_line(EOFError()) == 'EOFError' and len(one_line(ValueError('x' * 999))) == 200
