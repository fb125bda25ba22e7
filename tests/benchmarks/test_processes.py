# SPDX-License-Identifier: Apache-2.0
"""Commands of the program in a process of their own: what they print, where they run, and what is said when one fails."""

import pytest

from benchmarks import processes
from dnnlib import UserError


@pytest.mark.slow
def test_commands_run_in_the_current_folder(tmp_path, monkeypatch):
    """One after another, the program's own and not what lies there under their names; the error is that of the second."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'train.py').write_text('raise SystemExit("the wrong file")')
    (tmp_path / 'photos').mkdir()
    with pytest.raises(UserError, match=r'dataset_tool.py --source=photos --dest=a.zip: ended with code 1: .*photos'):
        processes.call(('train', ['--weight=help']), ('dataset_tool', ['--source=photos', '--dest=a.zip']))


def test_last_snapshot(tmp_path):
    assert processes.snapshot(tmp_path) is None
    for name in ('000010', '000200', '000030'):
        (tmp_path / f'network-snapshot-{name}').mkdir()
    assert processes.snapshot(tmp_path) == str(tmp_path / 'network-snapshot-000200')
