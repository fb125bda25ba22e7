# SPDX-License-Identifier: Apache-2.0
"""U-ViT: the published network in outputs, gradients, sizes and initial weights; texts, guidance, refusals."""

import pytest
import torch
from torch.nn import functional as F

from dnnlib import UserError
from tests.support import transformers
from tests.support.transformers import Case
from training.networks import conditioning
from training.networks.preconditioning import build_network
from training.networks.uvit import SIZES, UViT

MIDDLE = {'patch_embed': 'patch_tokens', 'map_noise': 't_sinusoid', 'time_embed': 'time_embed', 'in_blocks.0': 'in_block0',
          'mid_block.attn': 'mid_block_attn', 'mid_block': 'mid_block', 'out_blocks.0': 'out_block0', 'out_blocks.1': 'out_block1',
          'decoder_pred': 'decoded_tokens'}
TINY = {'embed_dim': 16, 'depth': 2, 'num_heads': 2}
PUBLISHED = {  # file: size, constructor arguments
    'cifar10_uvit_small': ('S', 32, 3, {}), 'celeba64_uvit_small': ('S', 64, 3, {'patch_size': 4}),
    'imagenet64_uvit_mid': ('M', 64, 3, {'patch_size': 4, 'label_dim': 1000, 'null_label': False}),
    'imagenet64_uvit_large': ('L', 64, 3, {'patch_size': 4, 'label_dim': 1000, 'null_label': False}),
    'imagenet256_uvit_large': ('L', 32, 4, {'label_dim': 1000}), 'imagenet256_uvit_huge': ('H', 32, 4, {'label_dim': 1000, 'conv': False}),
    'imagenet512_uvit_large': ('L', 64, 4, {'patch_size': 4, 'label_dim': 1000}),
    'imagenet512_uvit_huge': ('H', 64, 4, {'patch_size': 4, 'label_dim': 1000, 'conv': False}),
    'mscoco_uvit_small': ('S', 32, 4, {'label_dim': 77 * 768, 'clip_dim': 768}),
    'mscoco_uvit_small_deep': ('S-deep', 32, 4, {'label_dim': 77 * 768, 'clip_dim': 768})}


@pytest.mark.parametrize('name', [*transformers.cases('uvit'), *(pytest.param(name, marks=pytest.mark.slow)
                                                                 for name in transformers.cases('uvit', fast=False))])
def test_published_outputs(name):
    """Also guided: cond + s (cond - uncond), where "no label" is the last class."""
    case = Case('uvit', name)
    transformers.check_outputs(case)
    if 'out.cfg' in case.io:
        s = case.info['cfg_scale']
        with torch.no_grad():
            cond, uncond = case.run(), case.net(case.io['in.x'], case.io['in.t'], torch.zeros(1, case.net.label_dim))
        case.close(cond + s * (cond - uncond), 'out.cfg')


@pytest.mark.parametrize('name', transformers.cases('uvit'))
def test_published_gradients_and_intermediate_tensors(name):
    transformers.check_gradients(Case('uvit', name))
    assert 'decoded_tokens' in transformers.check_middle(Case('uvit', name), MIDDLE)


@pytest.mark.parametrize('name, size', transformers.sizes('uvit', fast=('U-ViT-H/2-imagenet256', 'U-ViT-S/2-mscoco')))
def test_published_sizes(name, size):
    transformers.check_counts('uvit', name, size)


def test_initial_weights():
    transformers.check_initial_weights('uvit')


# Texts


def test_texts_are_rows_of_tokens():
    """Each token of a row is embedded by itself, "no label" gives the bias, and a row is dropped as a whole."""
    net = UViT(4, 1, 1, label_dim=3 * 5, clip_dim=5, label_dropout=0.5, **TINY).requires_grad_(False).eval()
    texts = torch.arange(30.0).reshape(2, 3, 5)
    embedding = net.label_embedding
    found = embedding(texts.flatten(1))
    expected = F.linear(texts, embedding.weight, embedding.bias + 0.5)
    embedding.bias += 0.5
    torch.testing.assert_close(embedding(texts.flatten(1)).unflatten(1, (3, 16)), expected)
    assert torch.equal(embedding(torch.zeros(1, 15)), embedding.bias.repeat(3)[None]) and found.shape == (2, 48)
    net.train()
    rows = embedding(texts.flatten(1)[:1].expand(400, -1))
    dropped, kept = (rows == embedding.bias.repeat(3)).all(1), (rows - expected[:1].flatten(1)).abs().amax(1) < 1e-4
    assert torch.equal(dropped, ~kept) and 140 < dropped.sum() < 260


def test_perturbed_texts():
    """Condition-embedding perturbation counts all coordinates of a text: its norm is about gamma."""
    net = UViT(4, 1, 1, label_dim=3 * 5, clip_dim=5, **TINY).train()
    net.label_embedding.perturb = lambda embedding, draws: conditioning.gaussian(embedding, draws, gamma=2.0)
    labels = torch.ones(200, 15)
    change = net.label_embedding(labels) - net.eval().label_embedding(labels)
    assert abs(change.norm(dim=1).square().mean().sqrt() - 2) < 0.1


@pytest.mark.parametrize('change, told', [
    ({'size': 'XL'}, 'size=XL is unknown; choose from S, S-deep, M, L, H'),
    ({'patch_size': 3}, r'images of 16x4 .* multiple of patch_size=3'),
    ({'num_heads': 3}, r'num_heads=3 \(heads\) must divide the width, 16'),
    ({'embed_dim': 15, 'num_heads': 3}, 'embed_dim=15 .* multiple of 2'), ({'clip_dim': 4, 'label_dim': 6}, 'clip_dim=4 .*; label_dim=6'),
    ({'clip_dim': 4}, 'clip_dim=4'), ({'clip_dim': -1}, 'clip_dim=-1')])
def test_impossible_values_are_refused(change, told):
    with pytest.raises(ValueError, match=told) as err:
        UViT([16, 4], 1, 1, **TINY | change)
    assert '\n' not in str(err.value)


# Published weights


def weights(size, resolution, channels, **others):
    with torch.device('meta'):
        return UViT(resolution, channels, channels, size=size, **others).state_dict()


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_weights_are_recognised(name):
    """Texts and the size H have Stable Diffusion's discrete levels, all others the variance-preserving SDE."""
    size, resolution, channels, others = PUBLISHED[name]
    state = weights(size, resolution, channels, **others)
    config = UViT.published(state)
    discrete = 'huge' in name or 'mscoco' in name
    assert config['precond'] == ('iddpm' if discrete else 'vp') and config['size'] == size and others.items() <= config.items()
    levels = {'diffusion': 'scaled_linear:steps=1000', 'time_offset': 1, 'prediction': 'eps', 'learned_variance': False}
    assert not discrete or levels.items() <= config.items()
    own = {key: value for key, value in config.items() if key not in levels}
    with torch.device('meta'):
        net = build_network(own | {'precond': 'vp'})
    assert {name: value.shape for name, value in net.model.state_dict().items()} == {name: value.shape for name, value in state.items()}
    assert net.model.mid_block.attn.heads == SIZES[size][2] and net.sampling == {'sampler': 'dpmpp_2m', 'steps': 50}


def test_published_variants_are_recognised():
    state = weights('S', 16, 3, qkv_bias=True, mlp_time_embed=True, skip=False, mlp_ratio=2.0, label_dim=10)
    expected = {'qkv_bias': True, 'mlp_time_embed': True, 'skip': False, 'mlp_ratio': 2.0, 'label_dim': 10, 'img_resolution': 16}
    assert expected.items() <= UViT.published(state).items()
    assert UViT.published(state | {'pos_embed': torch.zeros(4)}) is None and UViT.published({}) is None


@pytest.mark.parametrize('others, told', [
    ({'depth': 4}, 'U-ViT weights of width 512 and depth 4 are of no published size'),
    ({'label_dim': 5 * 24, 'clip_dim': 24}, 'not the number of a square image')])
def test_weights_of_other_sizes_are_refused(others, told):
    with pytest.raises(UserError, match=told) as err:
        UViT.published(weights('S', 32, 3, **others))
    assert '\n' not in err.value.message
