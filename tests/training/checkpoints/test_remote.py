# SPDX-License-Identifier: Apache-2.0
"""Networks from the Hugging Face Hub and from URLs, both served on 127.0.0.1: fetched, cached, gone on with, refused."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dnnlib import UserError
from dnnlib.download import cache_dir, open_url
from tests.support import GOLDEN, edm_pickle, hub_server, launch, tiny
from training.checkpoints.load import load_network

DATA = GOLDEN
PUBLISHED = DATA / 'networks' / 'hf_ambient_laws'
OLD_CLIENT = DATA / 'hub' / 'old_client'
PICKLE = DATA / 'hub' / 'edm_pickle' / 'network-snapshot.pkl'
NAME = 'owner/ambient_laws_celeba_sigma_0.05_corruption_0.1_keep_1.0'


@pytest.fixture(scope='module')
def server():
    published = {name: data for name, data in hub_server.files_of(PUBLISHED).items() if name in ('config.json', 'model.safetensors')}
    repositories = {NAME: {'main': published}, 'owner/old': {'main': hub_server.files_of(OLD_CLIENT), 'v1': published},
                    'owner/bare': {'main': {'model.safetensors': published['model.safetensors']}}}
    with hub_server.serve(hub_server.HubHandler, repositories=repositories) as server:
        yield server


@pytest.fixture
def generate(tmp_path):
    """Runs generate.py with the Hub at an address; returns (exit code, output)."""
    def generate(url, network, *args, ranks=1, script=tiny.ROOT / 'generate.py', **environment):
        env = {'HF_TOKEN': '', 'HF_HUB_OFFLINE': '', 'HF_ENDPOINT': url, 'HF_HOME': str(tmp_path / 'cache'), **environment}
        done = launch.run(script, [f'--network={network}', '--batch=2', '--steps=2', *args], ranks, env, tmp_path)
        return done.returncode, done.stdout + done.stderr
    return generate


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_generate_from_the_hub_then_offline(server, generate, tmp_path):
    code, output = generate(server.url, NAME, '--outdir=online', '--seeds=0-3', ranks=2)
    assert code == 0, output
    asked = [line for line in server.log if 'safetensors' in line and line.startswith('GET')]
    assert len(asked) == 1, asked  # two ranks, one download
    code, output = generate('http://127.0.0.1:9', NAME, '--outdir=offline', '--seeds=0-3', HF_HUB_OFFLINE='1')
    assert code == 0, output
    code, output = generate('http://127.0.0.1:9', PUBLISHED, '--outdir=local', '--seeds=0-3')
    assert code == 0, output
    expected = pictures(tmp_path / 'local')
    assert sorted(expected) == [f'00000{i}.png' for i in range(4)]
    assert pictures(tmp_path / 'online') == pictures(tmp_path / 'offline') == expected


@pytest.mark.parametrize('network, words', [
    ('owner/nothing', 'no such repository'), (f'{NAME}@v9', 'no revision "v9"'), ('owner/bare', 'lacks config.json')])
def test_what_the_hub_does_not_have_is_one_line(server, generate, network, words, tmp_path):
    code, output = generate(server.url, network, '--outdir=out')
    assert code != 0 and output.startswith('Error: ') and output.count('\n') == 1 and words in output, output
    assert not list((tmp_path / 'out').iterdir())


def test_no_network_is_one_line(generate, tmp_path):
    impatient = 'import time\ntime.sleep = lambda seconds: None\n'  # the client waits half a minute
    (tmp_path / 'impatient.py').write_text(impatient + 'import generate\ngenerate.main()\n')
    code, output = generate('http://127.0.0.1:9', NAME, '--outdir=out', script=tmp_path / 'impatient.py')
    assert code != 0 and output.startswith('Error: ') and output.count('\n') == 1 and 'cannot be reached' in output, output


def test_older_files_and_revisions(server, tmp_path):
    script = ("import sys, torch; from training import load_network\n"
              "a, b = (load_network(ref).state_dict() for ref in ('owner/old', 'owner/old@v1'))\n"
              "assert all(torch.equal(a[key], b[key]) for key in b)")
    env = {**os.environ, 'HF_ENDPOINT': server.url, 'HF_HOME': str(tmp_path), 'PYTHONPATH': str(tiny.ROOT)}
    subprocess.run([sys.executable, '-c', script], env=env, check=True, timeout=100)
    assert any('resolve/v1/config.json' in line for line in server.log) and any('pytorch_model.bin' in line for line in server.log)


# --- URLs

@pytest.fixture
def files(tmp_path, monkeypatch):
    """A server of a pickle that need not break off, and an empty cache."""
    monkeypatch.setenv('AMBIENT_CACHE', str(tmp_path / 'downloads'))
    with hub_server.serve(hub_server.FileHandler, content=PICKLE.read_bytes(), tag='"one"', cuts=[]) as server:
        yield server


def test_a_pickle_by_its_url(files, tmp_path):
    expected = load_network(PICKLE).state_dict()
    digest = hashlib.sha256(files.content).hexdigest()
    for ref in (f'{files.url}/network.pkl', f'{files.url}/network.pkl#sha256={digest}', f'{files.url}/network.pkl#sha256={digest[:12]}'):
        found = load_network(ref).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert files.log == ['from 0']  # once, and then the cache
    with pytest.raises(UserError, match='SHA-256 is .* expected 1234'):
        load_network(f'{files.url}/network.pkl#sha256=1234')


def test_a_digest_that_differs_keeps_nothing(files, tmp_path):
    with pytest.raises(UserError, match='the download was deleted'):
        open_url(f'{files.url}/network.pkl#sha256=1234')
    assert not [path for path in (tmp_path / 'downloads').iterdir() if path.stat().st_size > 1000]


def test_a_broken_download_is_gone_on_with(files):
    files.cuts = [100_000] * 3
    path = open_url(f'{files.url}/network.pkl')
    assert files.log == ['from 0', 'from 100000', 'from 200000', 'from 300000']
    assert Path(path).read_bytes() == files.content
    assert {path.suffix for path in Path(path).parent.iterdir()} == {'.pkl', '.lock'}


def test_what_has_come_serves_the_next_call(files):
    url = f'{files.url}/network.pkl'
    files.cuts = [100_000, 0]  # no more comes at the second attempt, so that there is no third
    with pytest.raises(UserError, match=r'ended after 100000 of \d+ bytes \(100000 bytes are kept'):
        open_url(url)
    files.log.clear()
    assert Path(open_url(url)).read_bytes() == files.content and files.log == ['from 100000']


def test_another_version_starts_anew(files):
    part = Path(cache_dir()) / (hashlib.sha256(f'{files.url}/network.pkl'.encode()).hexdigest()[:12] + '-network.pkl.part')
    part.parent.mkdir()
    part.write_bytes(b'of the old version')
    Path(f'{part}.tag').write_text('"zero"')
    assert Path(open_url(f'{files.url}/network.pkl')).read_bytes() == files.content
    part.write_bytes(files.content)  # whole, but not yet renamed: the server has nothing behind it
    Path(f'{part}.tag').write_text('"one"')
    os.unlink(part.with_suffix(''))
    assert Path(open_url(f'{files.url}/network.pkl')).read_bytes() == files.content


def test_urls_that_fail_are_one_line(files, tmp_path):
    for url, words in ((f'{files.url}/other.pkl', '404'), ('http://127.0.0.1:9/network.pkl', 'refused')):
        with pytest.raises(UserError) as error:
            load_network(url)
        assert words in error.value.message and '\n' not in error.value.message and 'save it as' in error.value.message
    weights = (PUBLISHED / 'model.safetensors').read_bytes()
    for content, words in ((b'<!DOCTYPE html>', 'text file'), (weights, 'without their config.json')):
        shutil.rmtree(tmp_path / 'downloads', ignore_errors=True)
        files.content = content
        with pytest.raises(UserError, match=words):
            load_network(f'{files.url}/network.pkl')


def test_two_downloads_at_once_are_one(files):
    script = f"from dnnlib import open_url; open_url('{files.url}/network.pkl')"
    started = [subprocess.Popen([sys.executable, '-c', script], env={**os.environ, 'PYTHONPATH': str(tiny.ROOT)}) for _ in range(3)]
    assert [process.wait(timeout=100) for process in started] == [0, 0, 0]
    assert files.log == ['from 0']


# --- from any of them to a run of one's own

@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A snapshot of a short run on tiny data, and the folder of the data."""
    folder = tmp_path_factory.mktemp('source')
    data = tiny.make_zip(folder / 'data.zip')
    tiny.call(*tiny.FLAGS, f'--outdir={folder / "runs"}', f'--data={data}', '--seed=5', '--duration=0.00008')
    return next(tiny.only_folder(folder / 'runs').glob('network-snapshot-*')), data


@pytest.mark.parametrize('kind', ['folder', 'hub', 'pickle', 'url'])
def test_fine_tuning_as_published(source, tmp_path, kind):
    """--transfer=REF, then --consistency_coeff: the run starts from those weights, all of them."""
    snapshot, data = source
    net = load_network(snapshot)
    (tmp_path / 'network.pkl').write_bytes(edm_pickle.snapshot(net, tmp_path / 'marker'))
    repositories = {'owner/name': {'main': hub_server.files_of(snapshot)}}
    with (hub_server.serve(hub_server.HubHandler, repositories=repositories) as server,
          hub_server.serve(hub_server.FileHandler, content=(tmp_path / 'network.pkl').read_bytes(), tag='"one"', cuts=[]) as files):
        ref = {'folder': snapshot, 'hub': 'owner/name', 'pickle': tmp_path / 'network.pkl', 'url': f'{files.url}/network.pkl'}[kind]
        env = {'HF_ENDPOINT': server.url, 'HF_HOME': str(tmp_path), 'AMBIENT_CACHE': str(tmp_path)}
        # At such a learning rate the weights stay what they were, and the losses are those of the transferred network.
        args = [*tiny.FLAGS, f'--outdir={tmp_path / "out"}', f'--data={data}', '--seed=6', '--duration=0.00008', f'--transfer={ref}',
                '--consistency_coeff=0.5', '--num_consistency_steps=2', '--num_primes=2', '--consistency_batch_size=8', '--lr=1e-30']
        done = launch.run(tiny.ROOT / 'train.py', args, env=env)
    assert done.returncode == 0, done.stderr
    count = len(net.state_dict())
    assert f'Transferred {count} of {count} tensors from {ref}' in done.stdout
    run = tiny.only_folder(tmp_path / 'out')
    found = load_network(next(run.glob('training-state-*')), weights='raw').state_dict()
    assert all(torch.allclose(found[key], value, rtol=0, atol=1e-20) for key, value in net.state_dict().items())
    assert not (tmp_path / 'marker').exists()
    losses = tiny.read_log(run)[-1]
    assert any('consistency' in key for key in losses), losses
