# SPDX-License-Identifier: Apache-2.0
"""Min-SNR's ViT: the published network in outputs, gradients, sizes and initial weights; times, relative positions, refusals."""

import itertools

import pytest
import torch

from dnnlib import UserError
from tests.support import transformers
from tests.support.transformers import Case
from torch_utils import misc
from training.networks.preconditioning import build_network
from training.networks.vit import SIZES, TimeTable, VisionTransformer, relative_index, relative_rows

MIDDLE = {'patch_embed': 'patch_tokens', 'time_embedding': 'time_emb', 'blocks.0.attn': 'block0_attn', 'blocks.0': 'block0',
          'blocks.1': 'block1', 'norm': 'normed', 'linear_projection': 'projected_tokens'}
TINY = {'embed_dim': 16, 'depth': 1, 'num_heads': 2, 'num_steps': 5}


@pytest.mark.parametrize('name', [*transformers.cases('vit'), *(pytest.param(name, marks=pytest.mark.slow)
                                                                for name in transformers.cases('vit', fast=False))])
def test_published_outputs(name):
    """Also guided, in all channels: both halves of the batch are the first half, with labels and without."""
    case = Case('vit', name)
    transformers.check_outputs(case)
    for prefix, dtype in (('out.', torch.float32), ('out64.', torch.float64)):
        if f'{prefix}cfg' not in case.io:
            continue
        half = case.io['in.cfg_x'].chunk(2)[0].to(dtype)
        with torch.no_grad():
            out = case.net(torch.cat([half, half]), case.io['in.cfg_t'].to(dtype), case.labels(case.io['in.cfg_y'], dtype))
        cond, uncond = out.chunk(2)
        guided = (uncond + case.info['cfg_scale'] * (cond - uncond)).repeat(2, 1, 1, 1)
        torch.testing.assert_close(guided, case.io[f'{prefix}cfg'], rtol=0, atol=1e-10 if dtype == torch.float64 else
                                   case.limit * max(1, case.info['cfg_scale']))


@pytest.mark.parametrize('name', transformers.cases('vit'))
def test_published_gradients_and_intermediate_tensors(name):
    transformers.check_gradients(Case('vit', name))
    assert 'projected_tokens' in transformers.check_middle(Case('vit', name), MIDDLE)


def test_published_label_dropout():
    case = Case('vit', 'vit_p2_cond_drop')
    labels = case.labels(case.io['in.drop_y']) * (case.io['in.force_drop_ids'] != 1)[:, None]
    with torch.no_grad():
        case.close(case.net(case.io['in.x'], case.io['in.t'].float(), labels), 'out.force_drop')
    transformers.check_dropout(case)


@pytest.mark.parametrize('name', ['vit_p2_cond_sharedrel_noabs', 'vit_p4_uncond_relpos_conv_sigma'])
def test_published_relative_positions(name):
    case = Case('vit', name)
    index = [value for key, value in case.net.state_dict().items() if key.endswith('relative_position_index')]
    assert index and all(torch.equal(found, case.io['mid.rel_pos_index']) for found in index)


@pytest.mark.parametrize('extra', [1, 2])
def test_relative_positions_of_a_rectangle(extra):
    """Each offset between patches has a row of its own, and so has each kind of pair with a token that is no patch."""
    index = relative_index((2, 5), extra)
    patches = list(itertools.product(range(2), range(5)))
    rows = {}
    for (i, a), (j, b) in itertools.product(enumerate(patches), repeat=2):
        rows.setdefault((a[0] - b[0], a[1] - b[1]), set()).add(int(index[extra + i, extra + j]))
    assert len(rows) == 3 * 9 and all(len(found) == 1 for found in rows.values()) and len(set.union(*rows.values())) == 27
    kinds = [index[:extra, :extra].flatten(), *index[:extra, extra:], *index[extra:, :extra].T]
    found = [set(kind.tolist()) for kind in kinds]
    assert len(found[0]) == extra ** 2 and all(len(kind) == 1 for kind in found[1:])
    assert set.union(*found) == set(range(27, relative_rows((2, 5), extra)))


@pytest.mark.parametrize('name, size', transformers.sizes('vit', fast=('vit_xl_patch2_32 (depth 28, published ImageNet-256 run)',)))
def test_published_sizes(name, size):
    """The large size is the published network of 21 blocks, not the 24 of the first factory."""
    if 'depth 24' in name:
        assert SIZES[size][1] == 21
    else:
        transformers.check_counts('vit', name, size)


def test_initial_weights():
    transformers.check_initial_weights('vit')


def test_times_between_rows():
    """Whole times give exactly their row, others lie between two, and times beyond the table are its ends."""
    with misc.seeded('table'):
        table = TimeTable(5, 3).requires_grad_(False)
    assert torch.equal(table(torch.arange(5.0)), table.weight)
    assert torch.equal(table(torch.tensor([-2.0, 4.5, 1e3])), table.weight[[0, 4, 4]])
    torch.testing.assert_close(table(torch.tensor([2.25])), (0.75 * table.weight[2] + 0.25 * table.weight[3])[None])
    assert table(torch.tensor([2.5], dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize('change, told', [
    ({'size': 'H'}, 'size=H is unknown; choose from S, B, L, XL'), ({'patch_size': 3}, r'images of 16x4 .* multiple of patch_size=3'),
    ({'num_heads': 3}, r'num_heads=3 \(heads\) must divide the width, 16'), ({'num_steps': 0}, 'num_steps=0 must be 1 or more'),
    ({'use_rel_pos_bias': True, 'use_shared_rel_pos_bias': True}, 'exclude each other')])
def test_impossible_values_are_refused(change, told):
    with pytest.raises(ValueError, match=told) as err:
        VisionTransformer([16, 4], 1, 1, **TINY | change)
    assert '\n' not in str(err.value)


# Published weights


def weights(**others):
    with torch.device('meta'):
        return VisionTransformer(**{'img_resolution': 32, 'in_channels': 4, 'out_channels': 4, 'label_dim': 1000, 'size': 'S',
                                    'num_steps': 4000, **others}).state_dict()


@pytest.mark.parametrize('others, expected', [
    ({'size': 'XL'}, {'prediction': 'x0', 'size': 'XL', 'sampling': {'sampler': 'heun', 'steps': 50}}),
    ({'img_resolution': 64, 'patch_size': 4, 'in_channels': 3, 'out_channels': 3, 'size': 'L'},
     {'prediction': 'eps', 'size': 'L', 'img_channels': 3, 'sampling': {'sampler': 'heun', 'steps': 20}}),
    ({'num_steps': 1000}, {'num_steps': 1000}), ({'label_dim': 0}, {'img_resolution': 32}),
    ({'out_channels': 8}, {'learned_variance': True}),
    ({'size': 'B', 'use_abs_pos_emb': False, 'use_shared_rel_pos_bias': True}, {'use_abs_pos_emb': False, 'use_shared_rel_pos_bias': True}),
    ({'size': 'B', 'use_rel_pos_bias': True, 'use_mean_pooling': False, 'use_conv_last': True, 'init_values': 0.3},
     {'use_rel_pos_bias': True, 'use_mean_pooling': False, 'use_conv_last': True})])
def test_published_weights_are_recognised(others, expected):
    state = weights(**others)
    config = VisionTransformer.published(state)
    assert expected.items() <= config.items()
    assert {'precond': 'iddpm', 'C_1': 0.001, 'C_2': 0.008, 'M': 1000, 'model_type': 'VisionTransformer'}.items() <= config.items()
    with torch.device('meta'):
        net = build_network(config | {'prediction': 'eps'})
    assert {name: value.shape for name, value in net.model.state_dict().items()} == {name: value.shape for name, value in state.items()}
    assert net.model.blocks[0].attn.heads == SIZES[config['size']][2] and net.model.blocks[0].norm1.eps == 1e-6


@pytest.mark.parametrize('others, told', [
    ({'depth': 3}, 'ViT weights of width 512 and depth 3 are of no published size'),
    ({'img_resolution': [32, 16]}, '128 patches, which is not the number of a square'), ({'out_channels': 5}, 'last layer has 20 features'),
    ({'use_abs_pos_emb': False}, 'not the number of a square')])
def test_weights_of_other_sizes_are_refused(others, told):
    with pytest.raises(UserError, match=told) as err:
        VisionTransformer.published(weights(**others))
    assert '\n' not in err.value.message


def test_other_weights_are_not_recognised():
    state = weights()
    for name in ('time_embedding.weight', 'patch_embed.proj.weight', 'class_embedding.weight'):
        assert VisionTransformer.published(state | {name: torch.zeros([])}) is None
