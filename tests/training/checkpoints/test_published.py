# SPDX-License-Identifier: Apache-2.0
"""Weights as the authors of DiT, Min-SNR and U-ViT publish them: files of full size by path and URL, checkpoints, formats, refusals."""

import argparse
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from dnnlib import UserError
from tests.fuzz import mutators
from tests.support import GOLDEN, hub_server, unets
from torch_utils import misc
from training.checkpoints import load, published
from training.checkpoints.load import load_network
from training.networks.preconditioning import build_network
from training.sampling import labels, pieces
from training.sampling.guidance import Guidance

DATA = GOLDEN / 'transformers'
DIT, VIT, UVIT = ({'model_type': name, 'img_channels': 4, 'img_resolution': 32, 'label_dim': 1000} for name in
                  ('DiT', 'VisionTransformer', 'UViT'))
LEARNED = {'precond': 'iddpm', 'diffusion': 'linear:steps=1000', 'learned_variance': True, 'prediction': 'eps'}
COSINE = {'precond': 'iddpm', 'M': 1000, 'learned_variance': False}
STABLE = {'precond': 'iddpm', 'diffusion': 'scaled_linear:steps=1000', 'learned_variance': False, 'prediction': 'eps', 'time_offset': 1}
FILES = {  # name: arguments of a network that has these weights
    'DiT-XL-2-256x256.pt': {**DIT, **LEARNED, 'size': 'XL'},
    'ema_0.9999_xl.pt': {**VIT, **COSINE, 'size': 'XL', 'num_steps': 1000, 'prediction': 'x0'},
    'ema_0.9999_large.pt': {**VIT, **COSINE, 'size': 'L', 'img_channels': 3, 'img_resolution': 64, 'patch_size': 4, 'num_steps': 1000,
                            'prediction': 'eps'},
    'cifar10_uvit_small.pth': {**UVIT, 'precond': 'vp', 'size': 'S', 'img_channels': 3, 'label_dim': 0},
    'imagenet64_uvit_mid.pth': {**UVIT, 'precond': 'vp', 'size': 'M', 'img_channels': 3, 'img_resolution': 64, 'patch_size': 4,
                                'null_label': False},
    'imagenet512_uvit_huge.pth': {**UVIT, **STABLE, 'size': 'H', 'img_resolution': 64, 'patch_size': 4},
    'mscoco_uvit_small.pth': {**UVIT, **STABLE, 'size': 'S', 'label_dim': 77 * 768, 'clip_dim': 768},
}
SMALL = {**DIT, **LEARNED, 'size': 'S', 'patch_size': 8, 'img_resolution': 16, 'label_dim': 10}  # 33 million parameters, 4 tokens


def state_of(config, seed=0):
    """The published state dict of such a network: small values, all in one storage, so that its file is small."""
    with torch.device('meta'):
        shapes = {name: value.shape for name, value in build_network(config).model.state_dict().items()}
    size = max(shape.numel() for shape in shapes.values())
    values = torch.randn(size, generator=misc.generator('published', seed)) * 0.02
    return {name: values[:shape.numel()].view(shape) for name, shape in shapes.items()}


def sketched(path, **options):
    """The network of a file on the meta device, which its weights have been found to fit."""
    config, state = load.read(str(path), **options)
    with torch.device('meta'):
        net = build_network(config)
    load.check_weights(net, published.complete(config, state))
    return net


def output(net):
    x = torch.randn([2, net.img_channels, *[net.img_resolution] * 2], generator=misc.generator('x'))
    with torch.no_grad():
        return net(x, torch.tensor([0.5, 20.0]), torch.eye(net.label_dim)[:2])


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """(path of a file with the weights of SMALL, the network that they are of)."""
    path = tmp_path_factory.mktemp('small') / 'DiT-S-8.pt'
    torch.save(state_of(SMALL), path)
    return path, load_network(path)


# --- what is read

@pytest.mark.parametrize('name', FILES)
def test_files_of_full_size_are_recognised(tmp_path, name):
    config = FILES[name]
    torch.save(state_of(config), tmp_path / name)
    net = sketched(tmp_path / name)
    assert {**net.config, **config} == {'label_dim': 0, **net.config}
    assert net.sampling['steps'] in (20, 50, 250)
    factor = {3: None, 4: 0.23010 if 'coco' in name else 0.18215}[config['img_channels']]
    assert net.units == (None if factor is None else {'offset': 0, 'scale': pytest.approx(1 / factor)})
    classes = config['label_dim'] and config.get('null_label', True)
    assert net.config.get('label_dropout', 0) == (0.1 if classes else 0)  # so that nobody is warned of guiding it


def test_weights_are_those_of_the_file(small):
    path, net = small
    state = torch.load(path, weights_only=True)
    own = net.state_dict()
    assert own.keys() == {f'model.{name}' for name in state} and all(torch.equal(own[f'model.{name}'], state[name]) for name in state)
    assert output(net).isfinite().all() and not any(p.requires_grad for p in net.parameters())


def test_a_url_is_the_same(small, tmp_path, monkeypatch):
    path, net = small
    monkeypatch.setenv('AMBIENT_CACHE', str(tmp_path))
    with hub_server.serve(hub_server.FileHandler, content=path.read_bytes(), tag='"1"', cuts=[]) as server:
        assert torch.equal(output(load_network(f'{server.url}/network.pkl')), output(net))


def test_sampling_by_command_line(small, tmp_path):
    """By the sampler that goes with the weights: without a warning about guidance, and without limits to D, since latents are no pictures.
    What is written is what the autoencoder takes."""
    path, net = small
    result = unets.run(path, tmp_path / 'out', '--seeds=0-1', '--class=3', '--guidance=4', '--guidance-channels=3', '--decode=none')
    assert result.exit_code == 0 and 'Warning' not in result.output, result.output
    record = json.loads((tmp_path / 'out.json').read_text())
    assert record['sampler'] == 'ancestral' and record['steps'] == 2 and record['guidance_channels'] == 3
    found = np.load(tmp_path / 'out' / '000001.npy')
    expected = unets.all_images(net, [0, 1], **pieces.sampler_pieces(net, steps=2), labels=labels.one_class(3),
                                guidance=Guidance(4.0, channels=3))[1]
    np.testing.assert_allclose(found, expected / 0.18215, rtol=1e-5, atol=1e-5)
    assert found.shape == (4, 16, 16) and expected.abs().max() > 1


@pytest.mark.parametrize('zipped', [True, False])
def test_training_checkpoints_of_dit(small, tmp_path, zipped):
    """{model, ema, opt, args}: optimizer and arguments are not looked at, though the latter are no plain values."""
    path, net = small
    ema, raw = torch.load(path, weights_only=True), state_of(SMALL, seed=1)
    arguments = argparse.Namespace(model='DiT-S/8', epochs=1400, vae='ema', ratio=0.5)
    optimizer = {'state': {0: {'step': torch.tensor(3.0), 'exp_avg': torch.zeros(4)}}, 'param_groups': [{'lr': 1e-4}]}
    torch.save({'model': raw, 'ema': ema, 'opt': optimizer, 'args': arguments}, tmp_path / '0400000.pt',
               _use_new_zipfile_serialization=zipped)
    config, found = load.read(str(tmp_path / '0400000.pt'))
    assert config == net.config and found.keys() == ema.keys() and all(torch.equal(found[name], ema[name]) for name in ema)
    _, found = load.read(str(tmp_path / '0400000.pt'), 'raw')
    assert all(torch.equal(found[name], raw[name]) for name in raw)
    assert 'holds no ema:0.05 weights, but published ones; use --weights=ema or --weights=raw' in refused(
        tmp_path / '0400000.pt', weights='ema:0.05')


def test_formats(small, tmp_path):
    """PyTorch's format before 1.6, a safetensors file, and other types of numbers."""
    path, net = small
    state = torch.load(path, weights_only=True)
    torch.save(state, tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({name: value.clone() for name, value in state.items()}, tmp_path / 'DiT.safetensors')
    for name in ('old.pt', 'DiT.safetensors'):
        config, found = load.read(str(tmp_path / name))
        assert config == net.config and all(torch.equal(found[key], state[key]) for key in state)
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / 'half.pt')
    half = load_network(tmp_path / 'half.pt')
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(half.state_dict()['model.pos_embed'], state['pos_embed'], rtol=1e-3, atol=1e-6)


def test_a_config_beside_published_weights(tmp_path):
    """Networks that are of no published size: a folder with a config.json and the weights as they are; levels follow from the config."""
    config = {'model_type': 'VisionTransformer', 'img_resolution': 8, 'img_channels': 4, 'label_dim': 10, 'embed_dim': 64, 'depth': 2,
              'num_heads': 4, 'num_steps': 1000, 'precond': 'iddpm', 'learned_variance': False, 'prediction': 'x0'}
    shutil.copy(DATA / 'vit' / 'vit_p2_cond_drop' / 'model.safetensors', tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    net = load_network(tmp_path)
    io = safetensors.torch.load_file(DATA / 'vit' / 'vit_p2_cond_drop_sampler_and_loss' / 'io.safetensors')
    D = net(io['in.x'] * (1 + io['in.sigma'][1]), io['in.sigma'][1], F.one_hot(io['in.y'], 10))
    torch.testing.assert_close(D, io['D.x0.1'], rtol=0, atol=2e-4)  # the published levels are up to 5e-4 off


# --- what is refused

def refused(path, **options):
    with pytest.raises(UserError) as error:
        load_network(path, **options)  # which builds a network on the meta device, and no other before that is found to fit
    assert error.value.message.isprintable() and len(error.value.message) < 500
    assert error.value.message.startswith(str(path))
    return error.value.message


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.mkdir, (self.path,)


@pytest.mark.parametrize('change, words', [
    (lambda state: {'linear.weight': torch.zeros(3, 4), 'linear.bias': torch.zeros(3)},
     '2 tensors (linear.weight [3, 4], linear.bias [3], ...); those read without a config.json are published weights of DiT, '),
    (lambda state: {name: value for name, value in state.items() if name != 'pos_embed'}, 'published weights of DiT, '),
    (lambda state: {name: value for name, value in state.items() if name != 'blocks.3.mlp.fc1.bias'}, 'blocks.3.mlp.fc1.bias is missing'),
    (lambda state: {**state, 'blocks.1.attn.qkv.bias': torch.zeros(5)}, 'blocks.1.attn.qkv.bias is [5] in the weights and [1152]'),
    (lambda state: {**state, 'blocks.1000000.attn.qkv.bias': torch.zeros(5)}, 'of no published size'),
    (lambda state: {f'model.{name}': value for name, value in state.items()}, 'weights without their config.json'),
    (lambda state: {**state, 'x': torch.zeros(2, dtype=torch.complex64)}, 'cannot be read'),
    (lambda state: list(state.values()), 'no state dict of published weights'),
    (lambda state: {}, 'no state dict of published weights'),
    (lambda state: {'ema': 3, 'model': 4}, 'no state dict of published weights'),
    (lambda state: {**state, 'epoch': 3}, 'no state dict of published weights'),
    (lambda state: {'ema': state, 'args': argparse.Namespace(a=pathlib.PurePosixPath('x'))}, 'asks for pathlib'),
    (lambda state: argparse.Namespace(a=1), 'more than tensors and plain values')])
def test_wrong_ones(small, tmp_path, change, words):
    torch.save(change(torch.load(small[0], weights_only=True)), tmp_path / 'wrong.pt')
    assert words in refused(tmp_path / 'wrong.pt')


def test_nothing_is_executed(small, tmp_path):
    state = torch.load(small[0], weights_only=True)
    for zipped in (True, False):
        torch.save({'model': state, 'ema': state, 'opt': {}, 'args': Payload(tmp_path / 'made')}, tmp_path / 'a.pt',
                   _use_new_zipfile_serialization=zipped)
        assert 'which is not allowed' in refused(tmp_path / 'a.pt')
    assert not (tmp_path / 'made').exists()


def test_only_one_set_of_weights(small):
    assert 'holds no raw weights, but published ones; use --weights=ema' in refused(small[0], weights='raw')


def test_damaged_trees_are_recognised_or_refused(small, monkeypatch):
    """Tensors of strange shapes, missing and renamed ones."""
    state, draws, told = torch.load(small[0], weights_only=True), np.random.default_rng(0), []
    state = {name: state[name] for name in ('pos_embed', 'x_embedder.proj.weight', 'final_layer.linear.weight', 'blocks.0.mlp.fc1.weight',
                                            'blocks.0.adaLN_modulation.1.weight', 'y_embedder.embedding_table.weight')}
    for _ in range(300):
        try:
            config, _ = published.network(mutators.damage_tree(state, draws, deep=False))
        except UserError as err:
            told.append(err.message)
            assert '\n' not in err.message and err.message.isprintable() and len(err.message) < 500
        else:
            assert config['model_type'] == 'DiT'
    assert len({message[:40] for message in told}) > 3
