# SPDX-License-Identifier: Apache-2.0
"""Names of the Hub's repositories, and which of their files are fetched. Against a server: tests/training/checkpoints/test_remote.py."""

import huggingface_hub
import pytest

from dnnlib import UserError, hub


def test_names():
    assert hub.NAME.fullmatch('owner/name@v1').groupdict() == {'repo': 'owner/name', 'revision': 'v1'}
    assert hub.NAME.fullmatch('owner/name')['revision'] is None
    assert not any(hub.NAME.fullmatch(text) for text in ('name', 'a/b/c', 'https://host/file'))


def test_the_first_file_that_is_there(monkeypatch):
    def download(repo, name, revision):
        if name == 'new':
            raise huggingface_hub.utils.EntryNotFoundError('no new')
        return f'{repo}/{name}/{revision}'

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    assert hub.fetch('o/n@v', 'config', ('new', 'old'), repo='o/n', revision='v') == ['o/n/config/v', 'o/n/old/v']
    with pytest.raises(UserError, match='^--option=o/n: the repository lacks config, or new$'):
        hub.fetch('--option=o/n', 'config', 'new', repo='o/n')
