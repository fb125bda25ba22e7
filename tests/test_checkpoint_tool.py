# SPDX-License-Identifier: Apache-2.0
"""checkpoint_tool.py strip, export and push: the same network elsewhere, with what its run tells of it, or one line that says why not."""

import json
import os

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from PIL import Image

import checkpoint_tool
from tests.support import GOLDEN, hub_server, launch, tiny
from torch_utils import misc
from training.checkpoints import diffusers
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.networks import preconditioning
from training.sampling.generate import generate_images

DATA = GOLDEN / 'hub'
METRICS = {'fid_score': 12.5, 'inception_score': 2.25, 'num_images': 500, 'found_images': 500, 'ranks': 1,
           'detector': {'name': 'inception'},
           'reference': {'path': '/home/me/ref.npz', 'sha256': 'ab' * 32, 'num_images': 64, 'split': 'train'}}
ADM = {'img_resolution': 8, 'img_channels': 1, 'label_dim': 3, 'model_type': 'DhariwalUNet', 'model_channels': 128, 'channel_mult': [1, 1],
       'num_blocks': 1, 'attn_resolutions': [4], 'augment_dim': 9}


def tool(*args):
    result = CliRunner().invoke(checkpoint_tool.main, [str(arg) for arg in args])
    assert 'Traceback' not in result.output
    return result


def refused(*args):
    """The one line of a command that fails."""
    result = tool(*args)
    lines = result.output.strip().splitlines()
    assert result.exit_code != 0 and lines[-1].startswith('Error: ') and result.output.count('Error') == 1, result.output
    return lines[-1]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A short run on tiny data, with samples and a metric beside its snapshot."""
    folder = tmp_path_factory.mktemp('run')
    data = tiny.make_zip(folder / 'secret-name.zip')
    flags = [flag for flag in tiny.FLAGS if not flag.startswith('--samples')]
    tiny.call(*flags, f'--outdir={folder / "runs"}', f'--data={data}', '--seed=5', '--duration=0.00008', '--samples=4', '--power-ema=0.05')
    folder = tiny.only_folder(folder / 'runs')
    snapshot = folder / 'network-snapshot-000000.080'
    (folder / 'network-snapshot-000000.080.heun18.fid.json').write_text(json.dumps(result_of(snapshot)))
    return folder


def result_of(snapshot, **values):
    """A result of eval_fid.py --network=SNAPSHOT."""
    generated = {'network': f'/home/me/{snapshot.name}', 'sha256': misc.state_digest(load_network(snapshot)), 'weights': 'ema',
                 'sampler': 'heun', 'steps': 18, 'evaluations': 35, 'guidance': 1.0}
    return {**METRICS, 'generated': generated, **values}


def samples(ref, **options):
    net = load_network(ref, **options)
    return torch.cat([part.images for part in generate_images(net, [0, 1], num_steps=2)])


# --- strip and export

def test_train_snapshot_load_export_load_gives_equal_samples(run, tmp_path):
    state, snapshot = run / 'training-state-000000.080.pt', run / 'network-snapshot-000000.080'
    assert tool('strip', state, f'--dest={tmp_path / "a"}').exit_code == 0
    assert tool('export', tmp_path / 'a', '--format=folder', f'--dest={tmp_path / "b"}').exit_code == 0
    expected = samples(snapshot)
    for ref in (state, tmp_path / 'a', tmp_path / 'b'):
        assert torch.equal(samples(ref), expected)
    for weights in ('raw', 'ema:0.05'):
        dest = tmp_path / weights.replace(':', '-')
        assert tool('strip', state, f'--dest={dest}', f'--weights={weights}').exit_code == 0
        assert torch.equal(samples(dest), samples(state, weights=weights)) and not torch.equal(samples(dest), expected)
    assert sorted(os.listdir(tmp_path / 'a')) == ['README.md', 'config.json', 'model.safetensors', 'samples.png']
    assert sum(path.stat().st_size for path in (tmp_path / 'a').iterdir()) < state.stat().st_size / 3


def test_a_pickle_is_converted(tmp_path):
    source = DATA / 'edm_pickle' / 'network-snapshot.pkl'
    result = tool('strip', source, f'--dest={tmp_path / "net"}')
    assert result.exit_code == 0 and result.output.startswith(f'{tmp_path / "net"}: the network of ')
    found = load_network(tmp_path / 'net').state_dict()
    assert all(torch.equal(found[key], value) for key, value in load_network(source).state_dict().items())


def test_nothing_is_left_of_what_fails(run, tmp_path):
    snapshot = run / 'network-snapshot-000000.080'
    (tmp_path / 'taken').mkdir()
    assert 'exists' in refused('strip', snapshot, f'--dest={tmp_path / "taken"}')
    assert 'no such file or folder' in refused('strip', 'nothing', f'--dest={tmp_path / "net"}')
    assert '--weights' in refused('strip', snapshot, f'--dest={tmp_path / "net"}', '--weights=raw')
    assert 'sqrt(1/2)' in refused('export', snapshot, '--format=diffusers', f'--dest={tmp_path / "net"}')
    assert 'owner/name' in refused('push', snapshot, 'just-a-name')
    assert os.listdir(tmp_path) == ['taken'] and not os.listdir(tmp_path / 'taken')


# --- diffusers

def adm(**config):
    with misc.seeded('adm'):
        net = preconditioning.build_network({**ADM, **config}).eval()
    source = misc.generator('weights')
    for value in net.parameters():  # the last layers of blocks begin at zero
        value.data += 0.05 * torch.randn(value.shape, generator=source)
    return net


def test_what_diffusers_can_be_told(tmp_path):
    """Names and shapes are those that UNet2DModel has for that config.json (diffusers 0.42.1), and every weight is there once."""
    net = adm()
    save_network(net, tmp_path / 'net')
    assert tool('export', tmp_path / 'net', '--format=diffusers', f'--dest={tmp_path / "out"}').exit_code == 0
    expected = json.loads((DATA / 'diffusers_adm.json').read_text())
    assert json.loads((tmp_path / 'out' / 'unet' / 'config.json').read_text()) == expected['config']
    state = safetensors.torch.load_file(tmp_path / 'out' / 'unet' / 'diffusion_pytorch_model.safetensors')
    assert {key: list(value.shape) for key, value in state.items()} == expected['shapes']
    left_out = sum(value.numel() for key, value in net.state_dict().items() if 'map_augment' in key or 'resample_filter' in key)
    no_label = state['class_embedding.weight'].shape[1]
    assert sum(value.numel() for value in state.values()) - no_label == sum(value.numel() for value in net.state_dict().values()) - left_out
    assert torch.equal(state['class_embedding.weight'][-1], torch.zeros(no_label))
    assert (tmp_path / 'out' / 'README.md').exists() and (tmp_path / 'out' / 'scheduler' / 'scheduler_config.json').exists()


@pytest.mark.parametrize('config', [{}, {'label_dim': 0, 'num_blocks': 2, 'channel_mult': [1, 2, 1], 'attn_resolutions': [8, 2]}])
def test_diffusers_denoises_alike(tmp_path, config):
    diffusers = pytest.importorskip('diffusers')
    net = adm(**config)
    diffusers.write_diffusers(net, tmp_path)
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder='unet')
    scheduler = diffusers.EDMEulerScheduler.from_pretrained(tmp_path, subfolder='scheduler')
    scheduler.set_timesteps(5)
    source = misc.generator('x')
    labels = torch.tensor([1, net.label_dim])  # a class, and none
    rows = torch.eye(net.label_dim + 1)[labels, :-1] if net.label_dim else None
    with torch.no_grad():
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            x = sigma * torch.randn([2, 1, 8, 8], generator=source)
            prediction = unet(scheduler.scale_model_input(x, t), t, **({'class_labels': labels} if net.label_dim else {})).sample
            found = scheduler.step(prediction, t, x).pred_original_sample
            torch.testing.assert_close(found, net(x, sigma.float(), rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('config, words', [
    ({'precond': 'vp'}, '--precond=edm'), ({'model_channels': 32}, '32 groups'), ({'channel_mult': [2, 2]}, 'time embedding'),
    ({'model_channels': 160}, 'heads have 64'), ({'model_type': 'SongUNet'}, 'SongUNet')])
def test_what_diffusers_cannot_be_is_said(config, words):
    with misc.seeded(0):
        net = preconditioning.build_network({**ADM, **config})
    assert words in diffusers.difference(net)


# --- push

def test_a_dry_run_writes_the_card_with_all_that_the_run_tells(run, tmp_path):
    snapshot = run / 'network-snapshot-000000.080'
    (tmp_path / 'more.json').write_text(json.dumps(result_of(snapshot, kid=0.125)))
    result = tool('push', snapshot, 'owner/name', f'--dry-run={tmp_path / "out"}', f'--metrics={tmp_path / "more.json"}')
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(tmp_path / 'out')) == ['README.md', 'config.json', 'model.safetensors', 'samples.png']
    card = (tmp_path / 'out' / 'README.md').read_text()
    for words in ('![Samples', '0.08 thousand images', '"sigma": 0.4', '| kid | 0.1250 | heun18 |', '"use_labels"',
                  '| fid_score | 12.5000 | heun18 | 35 | 1 | ema | 500 | inception | 64 images, split train, sha256 abababababab |',
                  'license: unknown', f'Made with ambient-trainer {misc.VERSION}.'):
        assert words in card, card
    assert 'secret-name' not in card and '/home/me' not in card  # a card is public
    with Image.open(tmp_path / 'out' / 'samples.png') as image:
        assert image.size == Image.open(run / 'samples-000000.080.png').size
    assert torch.equal(samples(tmp_path / 'out'), samples(snapshot))


def test_a_card_quotes_results_of_its_own_network_alone(run, tmp_path):
    """Those of other snapshots and of images that tell no network are named and left out; given by hand they are refused."""
    snapshot, others = run / 'network-snapshot-000000.080', []
    for name, sha256, value in (('network-snapshot-000000.040.heun18', '12' * 32, 77.25), ('network-snapshot-000000.080.old', None, 88.5)):
        result = result_of(snapshot, fid_score=value)
        result['generated']['sha256'] = sha256
        others.append(run / f'{name}.fid.json')
        others[-1].write_text(json.dumps(result))
    (tmp_path / 'folder.json').write_text(json.dumps(  # of a folder of images, by its record
        {**METRICS, 'fid_score': 11.75, 'generated': {'path': 'out', 'sha256': 'ef' * 32, 'record': result_of(snapshot)['generated']}}))
    try:
        result = tool('push', snapshot, 'owner/name', f'--dry-run={tmp_path / "out"}', f'--metrics={tmp_path / "folder.json"}')
        assert result.exit_code == 0, result.output
        card = (tmp_path / 'out' / 'README.md').read_text()
        assert '12.5000' in card and '11.7500' in card and '77.25' not in card and '88.5' not in card
        assert f'not quoted: {others[0]}: is of another network' in result.output and 'sha256 121212121212' in result.output
        assert f'not quoted: {others[1]}: does not say which network' in result.output
        for path, words in zip(others, ('is of another network', 'does not say')):
            line = refused('push', snapshot, 'owner/name', f'--dry-run={tmp_path / "no"}', f'--metrics={path}')
            assert f'--metrics={path}: {words}' in line
        assert not (tmp_path / 'no').exists()
        assert 'not quoted' in tool('strip', snapshot, f'--dest={tmp_path / "strip"}').output
    finally:
        for path in others:
            path.unlink()


@pytest.mark.parametrize('name, tag', [('Apache-2.0', 'license: apache-2.0\n'), ('my-own-1', 'license: other\nlicense_name: my-own-1\n')])
def test_the_licence_and_the_code_are_told_as_the_hub_wants(run, tmp_path, name, tag):
    snapshot = run / 'network-snapshot-000000.080'
    tool('push', snapshot, 'owner/name', f'--dry-run={tmp_path / "out"}', f'--license={name}', '--code=https://example.org/code')
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert card.startswith(f'---\n{tag}tags:') and f'[ambient-trainer {misc.VERSION}](https://example.org/code)' in card
    assert '--license=a b' in refused('push', snapshot, 'owner/name', f'--dry-run={tmp_path / "no"}', '--license=a b')
    assert '"foo" is not an address' in refused('push', snapshot, 'owner/name', f'--dry-run={tmp_path / "no"}', '--code=foo')


@pytest.fixture(scope='module')
def server():
    with hub_server.serve(hub_server.HubHandler, repositories={}) as server:
        yield server


def push(server, cache, *args, token='hf_right'):
    """Runs the command with the Hub at the server's address, which its client reads when it is imported."""
    env = {'HF_ENDPOINT': server.url, 'HF_HOME': str(cache), 'HF_TOKEN': token}
    return launch.run(tiny.ROOT / 'checkpoint_tool.py', ['push', *args], env=env)


def test_push_then_load_gives_the_same_network(run, tmp_path, server):
    snapshot = run / 'network-snapshot-000000.080'
    done = push(server, tmp_path, snapshot, 'owner/name', '--private')
    assert done.returncode == 0 and f'pushed to {server.url}/owner/name/commit/' in done.stdout, done.stderr
    assert server.private == {'owner/name': True}
    done = push(server, tmp_path, run / 'training-state-000000.080.pt', 'owner/name', '--revision=raw', '--weights=raw')
    assert done.returncode == 0, done.stderr
    revisions = server.repositories['owner/name']
    assert sorted(revisions) == ['main', 'raw'] and revisions['main']['model.safetensors'] != revisions['raw']['model.safetensors']
    for revision, weights in (('main', 'ema'), ('raw', 'raw')):
        folder = tmp_path / revision
        folder.mkdir()
        for name, content in revisions[revision].items():
            (folder / name).write_bytes(content)
        assert torch.equal(samples(folder), samples(run / 'training-state-000000.080.pt', weights=weights))
        assert b'![Samples' in (folder / 'README.md').read_bytes()


@pytest.mark.parametrize('token', ['hf_wrong', ''])
def test_push_without_the_right_is_one_line(run, tmp_path, server, token):
    done = push(server, tmp_path, run / 'network-snapshot-000000.080', 'owner/other', token=token)
    assert done.returncode != 0 and done.stderr.startswith('Error: owner/other: ') and done.stderr.count('\n') == 1, done.stderr
    assert 'owner/other' not in server.repositories
