# SPDX-License-Identifier: Apache-2.0
"""DiT: the published network in outputs, gradients, sizes and initial weights; positions, rectangles, labels, refusals."""

import pytest
import torch

from dnnlib import UserError
from tests.support import transformers
from tests.support.transformers import Case
from training.networks.dit import SIZES, DiT, position_table
from training.networks.preconditioning import build_network

MIDDLE = {'x_embedder': 'patch_tokens', 'map_noise': 't_freq', 't_embedder.mlp': 't_emb', 'y_embedder.embedding_table': 'y_emb',
          'blocks.0.adaLN_modulation': 'block0_adaln', 'blocks.0.attn': 'block0_attn', 'blocks.0.mlp': 'block0_mlp', 'blocks.0': 'block0',
          'blocks.1': 'block1', 'final_layer': 'final_tokens'}
TINY = {'hidden_size': 16, 'depth': 1, 'num_heads': 2}


@pytest.mark.parametrize('name', [*transformers.cases('dit'), *(pytest.param(name, marks=pytest.mark.slow)
                                                                for name in transformers.cases('dit', fast=False))])
def test_published_outputs(name):
    case = Case('dit', name)
    transformers.check_outputs(case)
    guided, s = guided_forward(case, 3), case.info['cfg_scale']
    case.close(guided, 'out.cfg', s)
    if 'out64.cfg' in case.io:
        torch.testing.assert_close(guided_forward(case, 3, torch.float64), case.io['out64.cfg'], rtol=0, atol=1e-10)
    if 'out.cfg_all_channels' in case.io:
        case.close(guided_forward(case, case.io['in.x'].shape[1]), 'out.cfg_all_channels', s)


@torch.no_grad()
def guided_forward(case, channels, dtype=torch.float32):
    """Published guidance, of the first channels only: the first half of the images with their labels, then with none."""
    half = case.io['in.cfg_x'].chunk(2)[0].to(dtype)
    out = case.net(torch.cat([half, half]), case.io['in.cfg_t'].to(dtype), case.labels(case.io['in.cfg_y'], dtype))
    cond, uncond = out[:, :channels].chunk(2)
    guided = uncond + case.info['cfg_scale'] * (cond - uncond)
    return torch.cat([torch.cat([guided, guided]), out[:, channels:]], dim=1)


@pytest.mark.parametrize('name', transformers.cases('dit'))
def test_published_gradients_and_intermediate_tensors(name):
    transformers.check_gradients(Case('dit', name))
    assert 'final_tokens' in transformers.check_middle(Case('dit', name), MIDDLE)


@pytest.mark.parametrize('name', ['dit_p2_cond_sigma', 'dit_p8_cond_sigma'])
def test_published_label_dropout(name):
    case = Case('dit', name)
    forced = case.io['in.force_drop_ids'] == 1
    labels = case.labels(case.io['in.drop_y']) * ~forced[:, None]
    assert torch.equal(case.net.label_embedding(labels), case.io['mid.y_emb_forced_drop_eval'])
    transformers.check_dropout(case)


def test_published_positions_and_rectangles():
    """The column of a patch comes first; a rectangle has whole positions of its own sides."""
    case = Case('dit', 'dit_p2_cond_sigma')
    torch.testing.assert_close(position_table((4, 4), 64)[0], case.io['mid.pos_embed_float64'], rtol=0, atol=1e-14)
    assert torch.equal(case.net.pos_embed[0], case.io['mid.pos_embed'])
    rectangle = DiT(**transformers.arguments('dit', case.info['kwargs']) | {'img_resolution': [16, 8]}).eval()
    torch.testing.assert_close(rectangle.pos_embed[0], case.io['rect.pos_table'], rtol=0, atol=1e-7)
    rectangle.load_state_dict({key: value for key, value in case.net.state_dict().items() if key != 'pos_embed'}, strict=False)
    count = len(case.io['rect.x'])
    inputs = lambda dtype: (case.io['rect.x'].to(dtype), case.io['in.t'][:count].to(dtype), case.labels(case.io['in.y'][:count], dtype))
    with torch.no_grad():
        case.close(rectangle(*inputs(torch.float32)), 'rect.out')
        rectangle.pos_embed = position_table((8, 4), 64)
        torch.testing.assert_close(rectangle(*inputs(torch.float64)), case.io['rect.out64'], rtol=0, atol=1e-10)


@pytest.mark.parametrize('name, size', transformers.sizes('dit', fast=('DiT-XL/2', 'DiT-S/8')))
def test_published_sizes(name, size):
    transformers.check_counts('dit', name, size)


def test_initial_weights():
    net = transformers.check_initial_weights('dit')
    out = net(torch.ones(2, 4, 16, 16), torch.tensor([3.0, 900.0]), torch.eye(50)[:2])
    assert (out == 0).all() and out.shape == (2, 8, 16, 16)


def test_a_network_without_classes_has_the_row_of_no_label_alone():
    assert DiT(4, 1, 1, **TINY).y_embedder['embedding_table'].weight.shape == (1, 16) and DiT(4, 1, 1, **TINY).label_embedding is None
    assert DiT(4, 1, 1, **TINY, null_label=False).y_embedder is None


@pytest.mark.parametrize('change, told', [
    ({'size': 'M'}, 'size=M is unknown; choose from S, B, L, XL'), ({'patch_size': 3}, r'images of 16x4 .* multiple of patch_size=3'),
    ({'patch_size': 0}, 'patch_size=0'), ({'num_heads': 3}, r'num_heads=3 \(heads\) must divide the width, 16'),
    ({'hidden_size': 18, 'num_heads': 1}, 'hidden_size=18 .* multiple of 4'), ({'depth': -1}, 'depth=-1'), ({'mlp_ratio': 0}, 'mlp_ratio')])
def test_impossible_values_are_refused(change, told):
    with pytest.raises(ValueError, match=told) as err:
        DiT([16, 4], 1, 1, **TINY | change)
    assert '\n' not in str(err.value)


# Published weights


def weights(**others):
    with torch.device('meta'):
        return DiT(**{'img_resolution': 32, 'in_channels': 4, 'out_channels': 8, 'label_dim': 1000, 'size': 'S', **others}).state_dict()


@pytest.mark.parametrize('others, expected', [
    ({'size': 'XL'}, {'size': 'XL', 'label_dim': 1000}), ({'img_resolution': 64}, {'img_resolution': 64}),
    ({'patch_size': 8, 'label_dim': 10}, {'patch_size': 8, 'label_dim': 10}),
    ({'out_channels': 4}, {'learned_variance': False}), ({'null_label': False}, {'label_dim': 1000, 'null_label': False}),
    ({'label_dim': 0}, {'label_dim': 0}), ({'label_dim': 0, 'null_label': False}, {'null_label': False}),
    ({'mlp_ratio': 2.0, 'in_channels': 3, 'out_channels': 6}, {'mlp_ratio': 2.0, 'img_channels': 3})])
def test_published_weights_are_recognised(others, expected):
    state = weights(**others)
    config = DiT.published(state)
    assert expected.items() <= config.items()
    assert {'precond': 'iddpm', 'diffusion': 'linear:steps=1000', 'prediction': 'eps', 'model_type': 'DiT',
            'sampling': {'sampler': 'ancestral', 'steps': 250}}.items() <= config.items()
    with torch.device('meta'):
        net = build_network(config)
    assert {name: value.shape for name, value in net.model.state_dict().items()} == {name: value.shape for name, value in state.items()}
    assert net.model.blocks[0].attn.heads == SIZES[config['size']][2] and net.sampling == config['sampling']
    assert net.gives_variance == (others.get('out_channels') != 4)


def test_other_weights_are_not():
    state = weights()
    for name in ('pos_embed', 'x_embedder.proj.weight', 'final_layer.linear.weight'):
        assert DiT.published({key: value for key, value in state.items() if key != name}) is None
        assert DiT.published(state | {name: torch.zeros(3)}) is None and DiT.published(state | {name: torch.zeros([])}) is None
    assert DiT.published({}) is None


@pytest.mark.parametrize('others, told', [
    ({'depth': 3}, 'DiT weights of width 384 and depth 3 are of no published size'),
    ({'hidden_size': 64, 'num_heads': 1}, 'width 64'), ({'img_resolution': [32, 16]}, '128 patches, which is not the number of a square'),
    ({'out_channels': 5}, 'last layer has 20 features')])
def test_weights_of_other_sizes_are_refused(others, told):
    with pytest.raises(UserError, match=told) as err:
        DiT.published(weights(**others))
    assert '\n' not in err.value.message
