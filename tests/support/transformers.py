# SPDX-License-Identifier: Apache-2.0
"""The transformers beside the published ones: networks and numbers of tests/golden/transformers, and checks that the three share."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.support import GOLDEN
from torch_utils import misc
from training.networks.dit import DiT
from training.networks.uvit import UViT
from training.networks.vit import VisionTransformer

DATA = GOLDEN / 'transformers'
CLASSES = {'dit': DiT, 'vit': VisionTransformer, 'uvit': UViT}
TABLES = ('pos_embed', 'label_emb.weight', 'time_embedding.weight', 'class_embedding.weight', 'embedding_table.weight',
          'relative_position_bias_table')
UNUSED = ('qk_scale', 'use_checkpoint', 'drop_rate', 'attn_drop_rate', 'drop_path_rate', 'use_fp16')  # the same in all cases


def cases(family, fast=True):
    """Names of a family's small cases, or of those of full size."""
    names = sorted(path.parent.name for path in (DATA / family).glob('*/case.json') if 'kwargs' in json.loads(path.read_text()))
    return [name for name in names if name.startswith('formula_') != fast]


def arguments(family, kwargs, eps=None):
    """Published constructor arguments -> those of this program's class."""
    found = {key: value for key, value in kwargs.items() if key not in UNUSED}
    channels = found.pop('in_channels', None) or found.pop('in_chans')
    size = found.pop('input_size', None) or found.pop('img_size')
    outputs = channels * (1 + found.pop('learn_sigma', False))
    classes = max(found.pop('num_classes', 0), 0)
    dropout = found.pop('class_dropout_prob', found.pop('drop_label_prob', 0))
    if family == 'uvit':  # whose number of classes counts "no label"; 1000 are ImageNet's without it
        null = classes not in (0, 1000)
        classes = found.pop('num_clip_token') * found['clip_dim'] if 'clip_dim' in found else classes - null
        return dict(img_resolution=size, in_channels=channels, out_channels=outputs, label_dim=classes, null_label=null, **found)
    if family == 'vit':
        assert found.pop('qkv_bias')
        found |= {'init_values': found.get('init_values') or 0, 'norm_eps': eps}
    return dict(img_resolution=size, in_channels=channels, out_channels=outputs, label_dim=classes, null_label=dropout > 0,
                label_dropout=dropout, **found)


def formula_weights(net, case):
    """Fills the j-th parameter's element i with a hash of (i, j): weights that need no file."""
    params = dict(net.named_parameters())
    for j, name in enumerate(case['param_order']):
        if name in case.get('not_filled', []):
            continue
        p = params[name]
        h = np.arange(p.numel(), dtype=np.uint32) * np.uint32(2654435761) + np.uint32((j * 97654321 + case['formula_salt']) % 2 ** 32)
        for shift, factor in ((16, 2246822519), (13, 3266489917)):
            h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
        u = (h ^ (h >> np.uint32(16))) / 2 ** 32
        module, _, last = name.rpartition('.')
        if name.endswith(TABLES):
            values = (2 * u - 1) * math.sqrt(3) * 0.5
        elif p.ndim >= 2:
            values = (2 * u - 1) * math.sqrt(3 / p[0].numel())
        else:
            values = 0.2 * (u - 0.5) + ('norm' in module and last == 'weight' or last.startswith('gamma'))
        p.data.copy_(torch.from_numpy(values.astype(np.float32)).reshape(p.shape))


class Case:
    """A published network: `net` with its weights, `io` with its inputs and outputs, `info` with all else."""

    def __init__(self, family, name):
        folder = DATA / family / name
        self.info, self.io = json.loads((folder / 'case.json').read_text()), load_file(folder / 'io.safetensors')
        self.net = CLASSES[family](**arguments(family, self.info['kwargs'], self.info.get('norm_layer_eps'))).eval()
        self.limit = 2e-5 if family == 'vit' else 1e-4  # that of sinusoids of times near 1000 in float32
        if self.info['weights'] == 'formula':
            formula_weights(self.net, self.info)
        else:
            self.net.load_state_dict({key: value.to(self.net.state_dict()[key].dtype)
                                      for key, value in load_file(folder / self.info['weights']).items()})

    def labels(self, y, dtype=torch.float32):
        """Published labels -> rows; "no label", the class after the last, is an all-zero row."""
        if 'in.context' in self.io:
            return self.io['in.context'].flatten(1).to(dtype)
        return F.one_hot(y, self.net.label_dim + 1)[:, :-1].to(dtype) if self.net.label_dim else None

    def run(self, x='in.x', t='in.t', y='in.y', dtype=torch.float32):
        """The network's output for inputs of these names."""
        return self.net(self.io[x].to(dtype), self.io[t].to(dtype), self.labels(self.io.get(y), dtype))

    def close(self, found, name, scale=1.0):
        torch.testing.assert_close(found, self.io[name], rtol=0, atol=self.limit * scale, msg=lambda text: f'{name}: {text}')


def check_outputs(case):
    """Names and shapes in their published order; outputs in float32 and float64."""
    state = {name: list(value.shape) for name, value in case.net.state_dict().items()}
    assert list(state.items()) == list(case.info['state_dict'].items())
    with torch.no_grad():
        for name in ('y', 't_frac', 't_int'):
            t = 'in.t' if name == 'y' else f'in.{name}'
            if f'out.{name}' in case.io:
                case.close(case.run(t=t), f'out.{name}')
            if f'out64.{name}' in case.io:
                torch.testing.assert_close(case.run(t=t, dtype=torch.float64), case.io[f'out64.{name}'], rtol=0, atol=1e-10)


def check_gradients(case):
    x = case.io['in.x'].clone().requires_grad_()
    out = case.net(x, case.io['in.t'].float(), case.labels(case.io.get('in.y')))
    (out * case.io['in.grad_cotangent']).sum().backward()
    case.close(x.grad, 'out.grad_x')
    for name, p in case.net.named_parameters():
        assert float(p.grad.double().norm()) == pytest.approx(case.info['grad_norms'][name], rel=1e-4), name


def check_middle(case, modules):
    """Outputs of modules, {module: name of the tensor}, as far as the case has them."""
    seen = {}
    for module, name in modules.items():
        layer = dict(case.net.named_modules()).get(module)
        if f'mid.{name}' in case.io and layer is not None:
            layer.register_forward_hook(lambda _, args, out, name=name: seen.setdefault(name, out))
    with torch.no_grad():
        case.run()
    for name, out in seen.items():
        out, expected = torch.cat(out, dim=2)[:, 0] if isinstance(out, tuple) else out, case.io[f'mid.{name}']
        told = lambda text, name=name: f'{name}: {text}'
        torch.testing.assert_close(out, expected[:, -out.shape[1]:], rtol=1e-4, atol=case.limit, msg=told)
    return seen.keys()


def check_dropout(case):
    """In training, a row whose uniform number lies below the probability is "no label"."""
    def keep(name, shape, p, device):
        assert shape == [len(case.io['in.drop_y']), 1] and p == case.info['kwargs'].get('class_dropout_prob', case.info['kwargs'].get(
            'drop_label_prob'))
        return (case.io['train.drop_uniform'] >= p)[:, None]
    case.net.label_embedding.draws.keep = keep
    case.net.train()
    with torch.no_grad():
        case.close(case.run(y='in.drop_y'), 'train.y')


def count_cases(family):
    return json.loads((DATA / family / 'param_counts.json').read_text())['counts']


def check_counts(family, name, size):
    """Parameters, their names in order, heads, and multiply-accumulates of one image, for a published network that `size` builds.

    The published classes look a label up, where this program multiplies by the table."""
    case = count_cases(family)[name]
    kwargs = arguments(family, case['kwargs'], 1e-6)
    short = {key: value for key, value in kwargs.items() if key not in ('hidden_size', 'embed_dim', 'depth', 'num_heads')}
    with torch.device('meta'):
        net = CLASSES[family](**short, size=size).eval()
        inputs = torch.zeros(1, net.patch_embed.proj.weight.shape[1] if family != 'dit' else net.x_embedder.proj.weight.shape[1],
                             *misc.height_width(kwargs['img_resolution'])), torch.zeros(1), torch.zeros(1, net.label_dim)
        with FlopCounterMode(display=False) as counter:
            net(*inputs)
    state = net.state_dict()
    keys = '\n'.join(f'{key} {tuple(value.shape)}' for key, value in state.items())
    assert hashlib.sha256(keys.encode()).hexdigest() == case['state_dict_keys_sha256']
    assert sum(p.numel() for p in net.parameters()) == case['n_trainable']
    assert sum(value.numel() for value in state.values()) == case['n_params']
    assert {block.attn.heads for block in net.modules() if hasattr(block, 'attn')} == {case['kwargs']['num_heads']}
    table = next((value.numel() for key, value in state.items() if key.endswith(TABLES[1:2] + TABLES[3:5])), 0)
    assert counter.get_total_flops() == 2 * (case['macs_matmul_conv'] + table)


def sizes(family, fast):
    """Parameters of a test of check_counts(): (name, size); all but some are slow."""
    words = {'vit_base': 'B', 'vit_large': 'L', 'vit_xl': 'XL'}
    size = lambda name: next((words[word] for word in words if name.startswith(word)), None) or (
        'S-deep' if 'Deep' in name else name.split('/')[0].split('-')[-1])
    return [pytest.param(name, size(name), marks=[] if name in fast else pytest.mark.slow) for name in count_cases(family)]


def check_initial_weights(family):
    """Each tensor has the published law: constant, uniform or normal, with its std."""
    golden = json.loads((DATA / family / 'init_stats.json').read_text())
    with misc.seeded('initial weights'):
        net = CLASSES[family](**arguments(family, golden['kwargs'], 1e-6))
    state = net.state_dict()
    assert {name for name in state if not name.endswith('_index')} == golden['params'].keys()
    for name, expected in golden['params'].items():
        p, std, largest = state[name], expected['std'], expected['absmax']
        if largest == 2:  # the published initialiser drew the bound at which it cuts, a hundred stds away; this is without that value
            std, largest = math.sqrt(std ** 2 - largest ** 2 / p.numel()), math.inf
        assert list(p.shape) == expected['shape'], name
        if std == 0:
            assert (p == expected['mean']).all(), name
            continue
        assert abs(float(p.std(correction=0)) / std - 1) < 5 / math.sqrt(p.numel()), name
        if name != 'pos_embed' or family != 'dit':
            assert abs(float(p.mean())) < 5 * std / math.sqrt(p.numel()) or p.numel() < 8, name
        if p.numel() > 200:
            uniform = largest < 1.75 * std
            assert (float(p.abs().max()) < 1.75 * std * (1 + 5 / math.sqrt(p.numel()))) == uniform, name
    return net
