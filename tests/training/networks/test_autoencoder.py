# SPDX-License-Identifier: Apache-2.0
"""Autoencoders: EDM2's encoders by their goldens, ranges of pixels, chunks, diffusers' AutoencoderKL, and what is refused."""

import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from dnnlib import UserError
from tests.support import GOLDEN
from tests.support.autoencoders import TINY, Tiny, save_tiny_kl
from training.data.convert.encode import CONSTANTS
from training.data.latents import sample
from training.networks.autoencoder import AUTOENCODERS, Autoencoder, Coder, described, open_autoencoder, open_coder
from training.networks.preconditioning import build_network
from training.sampling import pixels

SMALL = dict(img_resolution=4, img_channels=4, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])


@pytest.fixture(scope='module')
def golden():
    return safetensors.torch.load_file(GOLDEN / 'encoders' / 'encoders.safetensors')


def pictures(count=3, side=8, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), np.uint8))


# ---- EDM2's encoders


def test_edm2_standard_rgb(golden):
    latents = pixels.to_network(golden['rgb.pixels'].numpy(), None)
    assert torch.allclose(latents.float(), golden['rgb.latents'], rtol=0, atol=1e-7)
    assert torch.equal(pixels.to_uint8(golden['rgb.decode_in']), golden['rgb.decode_out'])


def test_edm2_latents_and_pixels(golden):
    range, units = CONSTANTS['edm2']
    mean, std = golden['vae.raw_latents'].chunk(2, dim=1)
    drawn = sample(golden['vae.raw_latents'], golden['vae.noise'])
    assert torch.allclose(drawn, mean + std * golden['vae.noise'])
    found = (drawn.double() - torch.tensor(units['offset'], dtype=torch.float64)[:, None, None]) / torch.tensor(
        units['scale'], dtype=torch.float64)[:, None, None]
    assert torch.allclose(found.float(), golden['vae.final_latents'], rtol=1e-5, atol=1e-6)
    assert torch.allclose(pixels.to_physical(golden['vae.final_latents'], units), golden['vae.decoder_input'], rtol=1e-5, atol=1e-5)
    coder = Coder(Tiny('x'), 'x', range)
    assert torch.equal(coder.as_uint8(golden['vae.decoder_stub_output'].clamp(0, 1)), golden['vae.pixels_uint8'])
    assert range == '0..1'


# ---- ranges and chunks


class Identity(Autoencoder):
    """What it is given is its mean; counts rows and notes the range of what it sees."""

    channels, factor = 3, 1

    def __init__(self, ref='', device='cpu'):
        self.device, self.sha256, self.seen, self.rows = torch.device(device), 'a' * 64, [], []

    def moments(self, x):
        self.seen.append((float(x.min()), float(x.max())))
        self.rows.append(len(x))
        return x, torch.zeros_like(x)

    def reconstruct(self, z):
        self.rows.append(len(z))
        return z


@pytest.mark.parametrize('range, low, high', [('-1..1', -1, 1), ('0..1', 0, 1)])
def test_ranges_and_back_to_the_grey_level(range, low, high):
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    coder = Coder(Identity(), 'x', range)
    mean, std = coder.encode(grey)
    assert coder.autoencoder.seen == [(low, high)] and not std.any()
    back = coder.as_uint8(coder.decode(mean))
    # "0..1" cuts off, as EDM2's program does, so that float32's rounding may show.
    assert (back.int() - grey.int()).abs().max() <= (0 if range == '-1..1' else 1)


def test_chunks_are_of_one_size_and_change_nothing():
    coder = Coder(Identity(), 'x')
    images = pictures(11)
    mean, _ = coder.encode(images)
    assert coder.autoencoder.rows == [8, 8] and len(mean) == 11
    one, _ = coder.encode(images[10:])
    assert torch.equal(one, mean[10:])
    coder.autoencoder.rows.clear()
    coder.decode(torch.zeros(3, 3, 1024, 1024))
    assert coder.autoencoder.rows == [1, 1, 1]  # large pictures one by one


def test_tiny_is_exact_where_squares_are_even():
    images = pictures(4, side=4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    coder = open_coder({'ref': TINY, 'range': '-1..1'})
    mean, std = coder.encode(images)
    assert mean.shape == (4, 4, 4, 4) and (std > 0).all()
    assert torch.equal(coder.as_uint8(coder.decode(mean)), images)


# ---- references


def test_digest_is_held():
    coder = open_coder({'ref': TINY, 'range': '-1..1'})
    assert coder.described == {'ref': TINY, 'range': '-1..1', 'sha256': coder.autoencoder.sha256}
    open_coder(coder.described)
    with pytest.raises(UserError, match='tiny:two: the autoencoder has weights of sha256 .*, and the latents are of one with'):
        open_coder({**coder.described, 'ref': 'tiny:two'})


def test_own_classes_are_found_by_their_name(monkeypatch):
    monkeypatch.setitem(AUTOENCODERS, 'same', Identity)
    assert isinstance(open_autoencoder('same:x'), Identity)


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, 'diffusers', None)
    with pytest.raises(UserError, match='somewhere: opening an AutoencoderKL needs the package diffusers: pip install diffusers$'):
        open_autoencoder('somewhere')


@pytest.mark.parametrize('value, problem', [
    ('x', 'must be an object'), ({'range': '0..1'}, 'must be an object'), ({'ref': 'x', 'range': '0..2'}, 'needs a "range"'),
    ({'ref': 'x', 'range': '0..1', 'sha256': 'abc'}, '64 hexadecimal'), ({'ref': 'x', 'range': '0..1', 'more': 1}, 'must be an object'),
    ({'ref': '', 'range': '0..1'}, 'must be an object'), ({'ref': 'x', 'range': ['0..1']}, 'needs a "range"')])
def test_descriptions(value, problem):
    with pytest.raises(ValueError, match=problem):
        described(value)
    with pytest.raises(UserError, match='network configuration: "autoencoder"'):
        build_network({**SMALL, 'autoencoder': value})


def test_config_keeps_the_description():
    told = {'ref': 'stabilityai/sd-vae-ft-mse', 'range': '0..1'}
    net = build_network({**SMALL, 'autoencoder': told})
    assert net.autoencoder == told and net.config['autoencoder'] == told
    assert build_network(SMALL).autoencoder is None


# ---- AutoencoderKL


def test_kl_equals_the_package(tmp_path):
    vae = save_tiny_kl(tmp_path / 'vae')
    coder, images = open_coder({'ref': str(tmp_path / 'vae'), 'range': '-1..1'}), pictures(8)
    assert (coder.channels, coder.factor, coder.image_channels) == (4, 2, 3)
    with torch.no_grad():
        expected = vae.encode(images.float() / 127.5 - 1).latent_dist
        decoded = vae.decode(expected.mean).sample
    mean, std = coder.encode(images)
    assert torch.allclose(mean, expected.mean, atol=1e-5) and torch.allclose(std, expected.std, rtol=1e-5)
    found = coder.as_uint8(coder.decode(expected.mean))
    assert (found.int() - (decoded / 2 + 0.5).clamp(0, 1).mul(255).round().int()).abs().max() <= 1
    assert (found == (decoded / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)).float().mean() > 0.999


def test_kl_in_a_folder_of_a_pipeline_and_by_its_kind(tmp_path):
    save_tiny_kl(tmp_path / 'pipeline' / 'vae')
    plain = open_autoencoder(str(tmp_path / 'pipeline' / 'vae'))
    for ref in (str(tmp_path / 'pipeline'), f'kl:{tmp_path / "pipeline"}'):
        assert open_autoencoder(ref).sha256 == plain.sha256


def test_kl_refuses_in_one_line(tmp_path):
    save_tiny_kl(tmp_path / 'vae')
    config, weights = tmp_path / 'vae' / 'config.json', tmp_path / 'vae' / 'diffusion_pytorch_model.safetensors'
    good, state = config.read_text(), safetensors.torch.load_file(weights)

    def refused(match):
        with pytest.raises(UserError, match=match) as caught:
            open_autoencoder(str(tmp_path / 'vae'))
        assert '\n' not in caught.value.message

    config.write_text(json.dumps({**json.loads(good), '_class_name': 'UNet2DModel'}))
    refused('is of the class "UNet2DModel"')
    config.write_text(good)
    safetensors.torch.save_file({key: value for key, value in state.items() if key != 'encoder.conv_in.weight'}, weights)
    refused('the weights do not fit config.json: encoder.conv_in.weight is missing')
    weights.write_bytes(b'not a file of weights')
    refused('cannot be opened as an AutoencoderKL')
    weights.unlink()
    refused('has no config.json and diffusion_pytorch_model.safetensors')


def test_kl_names(tmp_path):
    pytest.importorskip('diffusers')
    with pytest.raises(UserError, match='no such folder, and not a Hugging Face name'):
        open_autoencoder('/no/such/folder')
