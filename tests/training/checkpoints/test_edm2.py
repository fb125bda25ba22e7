# SPDX-License-Identifier: Apache-2.0
"""EDM2's published pickles as networks: their outputs, their latents, and averages reconstructed from them."""

import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import checkpoint_tool
from dnnlib import UserError
from tests.support import GOLDEN, edm_pickle, hub_server
from tests.support.unets import all_images
from torch_utils import misc
from training.checkpoints import edm2, posthoc
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.networks import ema, preconditioning
from training.run import build as run_build
from training.sampling.guidance import Guidance
from training.sampling.pieces import sampler_pieces

PICKLES = GOLDEN / 'edm2' / 'pickles'
NAMES = ['nosrc_tiny_edm2_latent_cond', 'nosrc_tiny_edm2_pixel_uncond_oldlayout']
CONFIG = {'img_resolution': 8, 'img_channels': 4, 'label_dim': 3, 'model_channels': 8, 'channel_mult': [1, 2], 'num_blocks': 1,
          'attn_resolutions': [4], 'channels_per_head': 8}
UNITS = {'offset': [5.81, 3.25, 0.12, -2.15], 'scale': [8.34, 9.24, 7.42, 6.56]}


def build(seed=0, **config):
    """A network whose weights and gains are what float16 holds."""
    source = misc.generator(f'edm2 {seed}')
    net = preconditioning.build_network({**CONFIG, 'model_type': 'EDM2UNet', **config}).eval().requires_grad_(False)
    for value in net.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=source).half())
    return net


def published(net, **options):
    """The bytes of a pickle with the network."""
    arguments = {key: value for key, value in net.config.items() if key != 'model_type'}
    return edm_pickle.edm2_snapshot(net.model, arguments, 'marker', **options)


def evaluate(net, io):
    with torch.no_grad():
        return net(io['x'], io['sigma'], io.get('class_labels'))


# --- networks

@pytest.mark.parametrize('name', NAMES)
def test_published_output(name, tmp_path):
    """That of float16 gains, also from a folder that the network was saved to; float() gives that of a network cast to float32."""
    io, net = safetensors.torch.load_file(PICKLES / f'{name}_io.safetensors'), load_network(PICKLES / f'{name}.pkl')
    apart = (io['D_half_parameters'] - io['D_float_parameters']).abs().max()
    save_network(net, tmp_path / 'net')
    again = load_network(tmp_path / 'net')
    for one in (net, again):
        assert (evaluate(one, io) - io['D_half_parameters']).abs().max() < 1e-6 < apart / 50
    assert torch.equal(evaluate(again, io), evaluate(net, io)) and misc.state_digest(again) == misc.state_digest(net)
    kinds = {value.dtype for value in net.state_dict().values() if value.ndim}
    gains = {name for name, value in net.state_dict().items() if value.dtype == torch.float16}
    assert kinds == {torch.float32} and gains == {name for name in net.state_dict() if name.endswith('gain')} and len(gains) == 11
    assert (evaluate(net.float(), io) - io['D_float_parameters']).abs().max() < 1e-6


def test_configuration():
    net, expected = (load_network(PICKLES / f'{name}.pkl') for name in NAMES), []
    latent, pixel = net
    expected = json.loads((PICKLES / f'{NAMES[0]}.json').read_text())['init_kwargs']
    expected.pop('logvar_channels')
    assert latent.config == {**expected, 'model_type': 'EDM2UNet', 'sampling': {'sampler': 'heun', 'steps': 32}, 'units': UNITS,
                             'autoencoder': {'ref': 'stabilityai/sd-vae-ft-mse', 'range': '0..1'}}
    assert pixel.units is None and 'autoencoder' not in pixel.config  # three channels, and constants of four
    assert latent.compute_dtype == torch.float16 and latent.sigma_data == 0.5
    assert sampler_pieces(latent)['num_steps'] == 32


def test_units_are_those_of_the_encoder():
    """(z - offset) / scale is what EDM2's encoder makes of its autoencoder's z."""
    arrays = safetensors.torch.load_file(GOLDEN / 'encoders' / 'encoders.safetensors')
    mean, std = arrays['vae.raw_latents'].chunk(2, dim=1)
    offset, scale = (torch.tensor(load_network(PICKLES / f'{NAMES[0]}.pkl').units[key])[:, None, None] for key in ('offset', 'scale'))
    z = mean + std * arrays['vae.noise']
    torch.testing.assert_close((z - offset) / scale, arrays['vae.final_latents'], rtol=1e-6, atol=1e-6)


def test_arguments_that_this_program_spells_otherwise(tmp_path):
    path = tmp_path / 'edm2-img64-s-1073741-0.075.pkl'
    path.write_bytes(published(build(clip_act=0), encoder=None).replace(b'clip_act\x94K\x00', b'clip_act\x94N\x94'))
    net = load_network(path)
    assert net.config['clip_act'] == 0 and net.config['use_fp16'] is True and net.units is None
    hostile = {**CONFIG, 'model_type': 'SongUNet', 'sampling': 3, 'use_fp16': False}
    path.write_bytes(edm_pickle.edm2_snapshot(build().model, hostile, 'marker', encoder=None))
    assert load_network(path).config == {**CONFIG, 'use_fp16': False, 'model_type': 'EDM2UNet', 'sampling': edm2.SAMPLING}


@pytest.mark.parametrize('encoder, words', [
    ({}, 'scale and bias'), ({'scale': [1, 2]}, 'scale and bias'), ({'scale': [0.0], 'bias': [1.0]}, 'scale and bias'),
    ({'scale': [float('nan')], 'bias': [1.0]}, 'scale and bias'), ({'scale': [1.0], 'bias': [float('inf')]}, 'scale and bias'),
    ({'scale': [True], 'bias': [1]}, 'scale and bias'), ({'scale': [1], 'bias': [1, 2]}, 'scale and bias'), ({'vae_name': None}, 'name'),
    ({'vae_name': 'x\x1b[31m'}, 'name'), ({'vae_name': ''}, 'name'), ({'vae_name': 'x' * 2000}, 'name'),
    (np.float32(1), None),
])
def test_encoders_that_are_refused(tmp_path, encoder, words):
    path = tmp_path / 'net.pkl'
    if words is None:
        made = edm_pickle.Persistent('OtherEncoder')
        path.write_bytes(published(build(), whole={'encoder': made}))
        words = "encoder of the class 'OtherEncoder'; those read are StabilityVAEEncoder, StandardRGBEncoder"
    else:
        missing = {} if 'vae_name' in encoder else {'scale': None, 'bias': None}
        path.write_bytes(published(build(), encoder={**edm_pickle.VAE, **missing, **encoder}))
    with pytest.raises(UserError, match=words) as error:
        load_network(path)
    assert error.value.message.startswith(f'{path}: ') and error.value.message.isprintable()


def test_other_structures_are_refused(tmp_path):
    path = tmp_path / 'net.pkl'
    for change, words in (({'num_blocks': 2}, 'weights do not fit the config'), ({'gain': 3}, 'unknown argument "gain"'),
                          ({'img_channels': 'x'}, '"img_channels" must be a number'), ({'num_blocks': 10 ** 9}, 'far larger')):
        path.write_bytes(edm_pickle.edm2_snapshot(build().model, {**CONFIG, **change}, 'marker'))
        with pytest.raises(UserError, match=words) as error:
            load_network(path)
        assert '\n' not in error.value.message
    path.write_bytes(edm_pickle.edm2_snapshot(edm_pickle.UNet(), CONFIG, 'marker'))
    with pytest.raises(UserError, match='weights do not fit the config'):
        load_network(path)


def test_by_url_as_a_guide_and_for_transfer(tmp_path, monkeypatch):
    """As published: a conditional network, guided by an unconditional one, from URLs."""
    monkeypatch.setenv('AMBIENT_CACHE', str(tmp_path / 'cache'))
    made = {'main': build(), 'guide': build(1, label_dim=0)}
    nets = {}
    for key, net in made.items():
        with hub_server.serve(hub_server.FileHandler, content=published(net), tag=f'"{key}"', cuts=[]) as files:
            nets[key] = load_network(f'{files.url}/network.pkl')
    plain, guided = (all_images(nets['main'], range(2), guidance=how) for how in (Guidance(), Guidance(1.4, net=nets['guide'])))
    assert plain.isfinite().all() and guided.isfinite().all() and not torch.equal(plain, guided)
    (tmp_path / 'main.pkl').write_bytes(published(made['main']))
    own = build(2)
    run_build.transfer_weights(str(tmp_path / 'main.pkl'), own)
    assert torch.equal(own.model.out_gain, made['main'].model.out_gain) and own.model.out_gain.dtype == torch.float32


# --- averages

KIMG = [(33554, 33554432), (67108, 67108864), (100663, 100663296), (134217, 134217728)]  # every 32 Mi images
NETWORK = 'edm2-img512-xs'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """(folder of published snapshots, {(nimg, width): network})."""
    folder, nets = tmp_path_factory.mktemp('published'), {}
    for kimg, nimg in KIMG:
        for width in (0.05, 0.1):
            net = nets[nimg, width] = build(f'{kimg} {width}')
            for mine, first in zip(net.buffers(), next(iter(nets.values())).buffers()):
                mine.copy_(first)
            (folder / f'{NETWORK}-{kimg:07d}-{width:.3f}.pkl').write_bytes(published(net))
    return folder, nets


def tool(*args):
    return CliRunner().invoke(checkpoint_tool.main, ['ema', *map(str, args)])


def refused(*args):
    result = tool(*args)
    assert result.exit_code == 1 and len(result.output.strip().splitlines()) == 1, result.output
    return result.output.strip()


def test_names_say_when_and_what(folder):
    stored = posthoc.stored_averages(folder[0])
    assert [item[1:] for item in stored] == [(nimg, width) for _, nimg in KIMG for width in (0.05, 0.1)]
    assert all(nimg % 2 ** 20 == 0 for _, nimg in KIMG)


@pytest.mark.parametrize('kimg, nimg', [(None, KIMG[-1][1]), (100663, KIMG[2][1]), (100663.296, KIMG[2][1])])
def test_reconstruction_from_published_snapshots(folder, tmp_path, kimg, nimg):
    """The sum of factor times snapshot, in float32; buffers as they are."""
    dest = tmp_path / 'net'
    result = tool(folder[0], '--length=0.135', f'--dest={dest}', *([] if kimg is None else [f'--kimg={kimg}']))
    assert result.exit_code == 0, result.output
    stored = sorted(key for key in folder[1] if key[0] <= nimg)
    factors = ema.reconstruction(stored, (nimg, 0.135))
    expected = ema.combine((folder[1][key].state_dict() for key in stored), factors)
    net = load_network(dest)
    assert len(stored) > 5 and sum(f'  {NETWORK}-' in line for line in result.output.splitlines()) == len(stored)
    for key, value in net.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)
    for own, first in zip(net.buffers(), folder[1][stored[0]].buffers()):
        assert torch.equal(own, first)
    assert net.units == UNITS and net.config['model_type'] == 'EDM2UNet'


def test_published_width_is_its_file(folder):
    net, used, error = posthoc.reconstruct(folder[0], 0.1, KIMG[1][1])
    factors = dict(used)
    assert factors.pop(f'{NETWORK}-0067108-0.100.pkl') == pytest.approx(1, abs=1e-8) and error < 1e-6
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, folder[1][KIMG[1][1], 0.1].state_dict()[key], rtol=1e-6, atol=1e-6)


def test_folders_that_are_refused(folder, tmp_path):
    dest, source = f'--dest={tmp_path / "net"}', folder[0]
    where = tmp_path / 'edm2'
    where.mkdir()
    assert 'NETWORK-KIMG-WIDTH.pkl' in refused(where, '--length=0.1', dest)
    for path in source.iterdir():
        os.link(path, where / path.name)
    assert 'at 134216 kimg; the nearest are at 134217.728 kimg' in refused(where, '--length=0.1', '--kimg=134216', dest)
    for name in ('x.pkl', 'edm2-img512-xs-134217-0.050.pkl', 'edm2-img512-xs-0134217-0.05.pkl', 'edm2-img512-xs-0134217.pkl',
                 '0134217-0.050.pkl', 'edm2-img512-xs-0134217-0.300.pkl', 'edm2-img512-xs-0134217-0.000.pkl',
                 'edm2-img512-xs-0000000-0.050.pkl'):
        (where / name).write_bytes(b'x')
        assert f'{name} is not named as a stored average of EDM2' in refused(where, '--length=0.1', dest)
        (where / name).unlink()
    other = where / 'edm2-img512-s-0134217-0.050.pkl'
    os.link(source / f'{NETWORK}-0134217-0.050.pkl', other)
    assert 'snapshots of 2 networks (edm2-img512-s, edm2-img512-xs)' in refused(where, '--length=0.1', dest)
    other.unlink()
    first = where / f'{NETWORK}-0033554-0.050.pkl'
    first.unlink()
    first.write_bytes(published(build(num_blocks=2)))
    assert f'{first}: this network differs in num_blocks from that of the last snapshot' in refused(where, '--length=0.135', dest)
    first.write_bytes(edm_pickle.edm2_snapshot(edm_pickle.UNet(), CONFIG, 'marker'))
    assert f'{first}: the weights do not fit the config' in refused(where, '--length=0.135', dest)
    broken = build()
    broken.model.out_gain.data.fill_(float('nan'))
    first.write_bytes(published(broken))
    assert 'not finite: 1 of 60 tensors: model.out_gain' in refused(where, '--length=0.135', dest)
    first.write_bytes(edm_pickle.ask_for('os', 'system'))
    assert f'{first}: asks for os.system' in refused(where, '--length=0.135', dest)
    assert not (tmp_path / 'net').exists()
