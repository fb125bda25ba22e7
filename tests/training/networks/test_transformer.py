# SPDX-License-Identifier: Apache-2.0
"""The pieces of transformers by themselves: patches, attention, normalisation, sizes."""

import math

import pytest
import torch

from dnnlib import UserError
from tests.support import archs
from torch_utils import misc, registry
from training.networks import transformer
from training.networks.interface import ARCHS
from training.networks.preconditioning import build_network

NAMES = pytest.mark.parametrize('arch', ['dit', 'vit', 'uvit'])
SIZES = {'S': (384, 12, 6), 'XL': (1152, 28, 16)}


def test_patches_and_images_are_inverse():
    """Tokens that hold their own pixels, channel last, give the image back, for a rectangle; its rows of patches follow each other."""
    x = torch.randn(2, 3, 4, 6, generator=misc.generator('x'))
    embed = transformer.PatchEmbed(3, 2, 12, init_bias=0)
    channel, i, j = torch.meshgrid(torch.arange(3), torch.arange(2), torch.arange(2), indexing='ij')
    embed.proj.weight.data = torch.nn.functional.one_hot((i * 2 + j) * 3 + channel, 12).permute(3, 0, 1, 2).float()
    tokens = embed(x)
    assert torch.equal(tokens[:, 1], x[:, :, :2, 2:4].permute(0, 2, 3, 1).flatten(1)) and transformer.patch_grid([4, 6], 2) == (2, 3)
    assert torch.equal(transformer.unpatchify(tokens, (2, 3), 2), x)


@pytest.mark.parametrize('biased', [False, True])
def test_attention_is_softmax_attention_per_head(biased):
    """Outputs of qkv are ordered by query, key or value, then head, then channel."""
    layer = archs.randomized(transformer.Attention(8, 2, transformer.normal_linear)).double()
    layer.proj.weight.data, layer.proj.bias.data = torch.eye(8).double(), torch.zeros(8).double()
    x, bias = (torch.randn(*shape, generator=misc.generator('x'), dtype=torch.float64) for shape in ((3, 5, 8), (2, 5, 5)))
    query, key, value = layer.qkv(x).chunk(3, dim=2)
    with torch.no_grad():
        out = layer(x, bias if biased else None)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        logits = query[..., part] @ key[..., part].mT / math.sqrt(4) + (bias[head] if biased else 0)
        torch.testing.assert_close(out[..., part], torch.softmax(logits, dim=2) @ value[..., part])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_normalisation_has_float32_statistics(dtype):
    """A large mean beside a small spread would be lost to statistics in half precision."""
    x = (30 + torch.randn(4, 6, 64, generator=misc.generator('x'))).to(dtype)
    norm = transformer.LayerNorm(64, 1e-6).requires_grad_(False)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).float(), norm(x.float()), rtol=2 ** -8, atol=2 ** -8)


@pytest.mark.parametrize('given, expected', [
    (('S', 0, 0, 0), (384, 12, 6)), (('XL', 0, 3, 0), (1152, 3, 16)), (('S', 384, 0, 0), (384, 12, 6)), (('S', 256, 0, 0), (256, 12, 4)),
    (('S', 48, 0, 0), (48, 12, 1)), (('S', 256, 2, 8), (256, 2, 8))])
def test_sizes_and_what_replaces_them(given, expected):
    assert transformer.dimensions(SIZES, *given) == expected


def test_keys_of_the_command_line_are_constructor_arguments():
    assert registry.build('dit:size=XL,patch=4', ARCHS)() == {'model_type': 'DiT', 'size': 'XL', 'patch_size': 4}
    assert registry.build('uvit:size=S-deep,width=64,heads=4', ARCHS)() == {
        'model_type': 'UViT', 'size': 'S-deep', 'patch_size': 2, 'embed_dim': 64, 'num_heads': 4}


def test_published_tables_have_a_row_of_no_label_except_at_a_thousand():
    assert transformer.published_labels(1001) == {'label_dim': 1000} and transformer.published_labels(11) == {'label_dim': 10}
    assert transformer.published_labels(1000) == {'label_dim': 1000, 'null_label': False}
    assert transformer.published_labels(1) == {'label_dim': 0}


@NAMES
def test_rectangles(arch):
    """16x4 at patches of 2: a published class would return 8x8. Without attention each patch depends on its own pixels alone."""
    net = archs.network(arch, img_resolution=[16, 4], img_channels=1)
    for name, p in net.named_parameters():
        if '.attn.proj.' in name:
            p.data.zero_()
        elif name == 'model.final_layer.weight':
            p.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    x = torch.randn(1, 1, 16, 4, generator=misc.generator('x')).requires_grad_()
    out = net(x, torch.tensor(1.0))
    assert out.shape == x.shape
    for row, column in ((0, 0), (5, 3), (14, 1)):
        (change,) = torch.autograd.grad(out[0, 0, row, column], x, retain_graph=True)
        place = torch.zeros_like(x, dtype=torch.bool)
        place[:, :, row // 2 * 2:row // 2 * 2 + 2, column // 2 * 2:column // 2 * 2 + 2] = True
        assert (change[place] != 0).all() and (change[~place] == 0).all()


@NAMES
def test_sides_that_are_no_multiple_of_the_patch(arch):
    with pytest.raises(UserError, match=r'images of 8x7 cannot be cut .* multiple of patch_size=2 \(patch\)') as err:
        build_network(archs.config(arch, img_resolution=[8, 7]))
    assert '\n' not in err.value.message
