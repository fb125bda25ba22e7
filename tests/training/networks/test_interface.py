# SPDX-License-Identifier: Apache-2.0
"""A network of one's own: a class, a line in the registry, and it is trained, saved and loaded like the others."""

import pytest
import torch

from dnnlib import UserError
from tests.support import tiny
from torch_utils import registry
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.networks import interface
from training.networks.interface import ARCHS, Arch, Network


class Mixer(Network):
    """A convolution, told the level by a bias: no label embedding, no augmentation labels."""

    short_names = {'width': 'cbase'}

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, width=8, kernel=3, act='relu'):
        super().__init__()
        interface.check_choice('act', act, ('relu', 'silu'))
        self.first = torch.nn.Conv2d(in_channels, width, kernel, padding=kernel // 2)
        self.last = torch.nn.Conv2d(width, out_channels, 1)
        self.act = getattr(torch.nn.functional, act)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        return self.last(self.act(self.first(x) + noise_labels.reshape(-1, 1, 1, 1)))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(ARCHS, 'mixer', Arch(Mixer, kernel=5))


@pytest.fixture
def no_unet(monkeypatch):
    """tiny's options without those of a U-Net."""
    unet = ('--cbase', '--cres', '--blocks', '--attn')
    monkeypatch.setattr(tiny, 'FLAGS', [flag for flag in tiny.FLAGS if not flag.startswith(unet)])


def test_keys_are_the_constructor_arguments_under_their_short_names():
    assert registry.parameters(ARCHS['mixer']) == dict(cbase=8, kernel=5, act='relu')
    assert ARCHS['mixer']() == dict(model_type='Mixer', kernel=5)
    assert ARCHS['mixer'](cbase=4, kernel=1) == dict(model_type='Mixer', kernel=1, width=4)
    assert interface.network_class('Mixer') is Mixer
    with pytest.raises(UserError, match='unknown model_type "Mixture"; choose from DhariwalUNet, Mixer'):
        interface.network_class('Mixture')


@pytest.mark.parametrize('name', ['adm', 'ddpmpp', 'ncsnpp'])
def test_what_other_options_give_is_no_key(name):
    keys = registry.parameters(ARCHS[name])
    assert keys.keys() >= {'cbase', 'cres', 'blocks', 'attn', 'dropout'} and not keys.keys() & set(Arch.GIVEN)


def test_it_is_trained_saved_and_loaded(tmp_path, no_unet):
    run = tiny.make_run(tmp_path, '--arch=mixer:act=silu', '--cbase=6', '--augment=0.5')  # without augmentation labels: it takes none
    assert run.config.network.arguments.items() >= dict(model_type='Mixer', kernel=5, width=6, act='silu').items()
    assert 'augment_dim' not in run.config.network.arguments
    before = [p.clone() for p in run.params]
    for _ in range(3):
        run.step()
    assert any((p != b).any() for p, b in zip(run.params, before)) and not int(run.guard.in_row)
    save_network(run.net, tmp_path / 'net')
    again = load_network(tmp_path / 'net')
    x, sigma = torch.ones(2, 1, 8, 8), torch.tensor([0.3, 2.0])
    assert isinstance(again.model, Mixer) and torch.equal(again(x, sigma), run.net.eval()(x, sigma))


@pytest.mark.parametrize('flags, words', [
    (['--blocks=2'], '"mixer" has no key "blocks"; it takes cbase=8, kernel=5, act=relu'),
    (['--dropout=0.1'], '"mixer" has no key "dropout"'),
    (['--cond=1', '--label-dropout=0.1'], '--label-dropout=0.1: --arch=mixer has no label dropout')])
def test_options_that_it_does_not_have_are_refused(tmp_path, no_unet, flags, words):
    with pytest.raises(UserError) as err:
        tiny.options(tmp_path, '--arch=mixer', *flags)
    assert words in err.value.message and '\n' not in err.value.message


def test_there_is_no_embedding_to_perturb(tmp_path, no_unet):
    with pytest.raises(UserError, match='--cep=uniform perturbs the embedding of a class label, and Mixer has none'):
        tiny.make_run(tmp_path, '--arch=mixer', '--cond=1', '--cep=uniform')


def test_what_the_constructor_refuses_is_said_in_one_line(tmp_path, no_unet):
    with pytest.raises(UserError, match='network configuration: act=tanh is unknown; choose from relu, silu'):
        tiny.make_run(tmp_path, '--arch=mixer:act=tanh')
