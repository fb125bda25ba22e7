# SPDX-License-Identifier: Apache-2.0
"""The package itself hands on what notebooks want first, and loads nothing before it is asked for it."""

import subprocess
import sys

import pytest
import torch

import training
from tests.support import ROOT
from tests.training.networks.test_preconditioning import small
from training.checkpoints.card import model_card


def test_the_usage_of_the_card_works(tmp_path):
    """The lines under "In Python", as they stand there."""
    net = small().eval()
    training.save_network(net, tmp_path / 'net')
    card = (tmp_path / 'net' / 'README.md').read_text()
    assert card == model_card(net.config)
    code = [line[4:] for line in card.split('In Python, ')[1].split('\n') if line.startswith('    ')]
    assert code[0] == 'from training import load_network'
    names = {'x': torch.ones(2, net.img_channels, 8, 8), 'sigma': torch.tensor(0.5)}
    exec('\n'.join(code).replace('NAME', str(tmp_path / 'net')), names)
    assert names['denoised'].shape == names['x'].shape
    images = next(training.generate_images(names['net'], [0, 1], num_steps=2)).images
    assert images.shape == names['x'].shape


def test_names_that_are_handed_on():
    assert set(training.__all__) == {'load_network', 'save_network', 'generate_images'} <= set(dir(training))
    for name, module in training.EXPORTS.items():
        assert getattr(training, name).__module__ == module
    with pytest.raises(AttributeError, match="module 'training' has no attribute 'nonsense'"):
        training.nonsense  # noqa: B018


def test_nothing_is_loaded_before_it_is_wanted():
    code = 'import sys, training; print([name for name in sys.modules if name.startswith(("training.", "torch"))])'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == '[]\n'
