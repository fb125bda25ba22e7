# SPDX-License-Identifier: Apache-2.0
"""What becomes of sampled images: as they are, or decoded; where an autoencoder is, and what is refused."""

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.support.autoencoders import TINY, Tiny
from training.networks.autoencoder import open_coder
from training.networks.preconditioning import build_network
from training.sampling import pixels
from training.sampling.generate import sample_grid
from training.sampling.outputs import Decoded, Plain, open_output

UNITS = {'offset': [3.0, 3, 3, 3], 'scale': [2.0, 4, 8, 6]}


def network(**config):
    return build_network(dict(img_resolution=4, img_channels=4, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1,
                              attn_resolutions=[], units=UNITS, **config)).eval()


def described(**more):
    return {'ref': TINY, 'range': '-1..1', 'sha256': Tiny('one').sha256, **more}


def encoded(range='-1..1'):
    """Pictures of which Tiny loses nothing, and their latents in network units."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 4, 4), np.uint8))
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    mean, _ = open_coder({'ref': TINY, 'range': range}).encode(images)
    return images, (mean.double() - 3) / torch.tensor(UNITS['scale'], dtype=torch.float64).reshape(4, 1, 1)


def test_encoded_pictures_are_decoded_to_the_grey_level():
    output, (images, latents) = open_output(network(autoencoder=described())), encoded()
    assert isinstance(output, Decoded) and output.is_picture and output.units is None and output.shape == [3, 8, 8]
    made = output(latents)
    assert torch.equal(output.uint8(made), images) and np.array_equal(output.pictures(made), images)
    assert torch.allclose(output.numbers(made), images.float() / 127.5 - 1, atol=1e-5) and output.numbers(made).dtype == torch.float32
    assert output.facts() == {'image_shape': [3, 8, 8], 'autoencoder': described(), 'decoded': True}


@pytest.mark.parametrize('range', ['-1..1', '0..1'])
def test_files_are_read_back(range):
    output = open_output(network(autoencoder=described(range=range)))
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(output.uint8(output.read(levels.numpy())), levels)
    numbers = torch.rand([3, 8, 8], generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(output.numbers(output.read(numbers.numpy())), numbers, atol=1e-6)


def test_none_leaves_latents_and_opens_nothing():
    net = network(autoencoder=described())
    Tiny.opened = 0
    output = open_output(net, 'none')
    assert isinstance(output, Plain) and not output.is_picture and output.shape == [4, 4, 4] and output.units == UNITS
    x = torch.ones([2, 4, 4, 4], dtype=torch.float64)
    assert torch.equal(output.numbers(output(x)), pixels.to_physical(x, UNITS).float()) and Tiny.opened == 0
    assert output.facts() == {'image_shape': [4, 4, 4], 'units': UNITS, 'autoencoder': net.autoencoder, 'decoded': False}


def test_networks_of_pixels_are_as_they_were():
    output = open_output(network())
    assert isinstance(output, Plain) and output.facts() == {'image_shape': [4, 4, 4], 'units': UNITS}
    with pytest.raises(UserError, match='--decode=tiny:one: the network makes images, not latents'):
        open_output(network(), TINY)


def test_another_place_and_other_weights():
    moved = network(autoencoder=described(ref='/gone/away'))
    assert open_output(moved, TINY).coder.described['ref'] == TINY
    with pytest.raises(UserError, match='--decode=auto: /gone/away: .*name another place of it with --decode=REF'):
        open_output(moved)
    with pytest.raises(UserError, match='--decode=tiny:two: tiny:two: the autoencoder has weights of sha256'):
        open_output(moved, 'tiny:two')
    assert open_output(network(autoencoder={'ref': TINY, 'range': '0..1'}), 'tiny:two')  # without a digest there is nothing to hold


def test_channels_must_agree(monkeypatch):
    monkeypatch.setattr(Tiny, 'channels', 8)
    with pytest.raises(UserError, match='the latents of tiny:one have 8 channels, those of the network 4'):
        open_output(network(autoencoder=described()))


def test_grids_are_of_pictures(tmp_path):
    from PIL import Image
    net = network(autoencoder=described())
    for output, size in ((open_output(net), 8), (None, 4)):
        sample_grid(net, 4, tmp_path / 'x.png', output=output, num_steps=2)
        picture = Image.open(tmp_path / 'x.png')
        assert picture.mode == ('RGB' if output else 'L') and picture.size == (2 * (64 // size * size + 2) + 2,) * 2
