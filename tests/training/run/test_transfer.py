# SPDX-License-Identifier: Apache-2.0
"""--transfer between networks that differ in classes or in the size of images: what means the same is copied, all else is named."""

import pytest
import torch

from tests.support import archs, unets
from torch_utils import misc
from training.checkpoints.save import save_network
from training.run.build import transfer_weights

TABLES = {'dit': 'y_embedder.embedding_table', 'vit': 'class_embedding', 'uvit': 'label_emb'}


def fresh(arch, **config):
    with misc.seeded('fresh'):
        return archs.randomized(archs.build_network(archs.config(arch, **config)), seed=1)


def transferred(source, net, tmp_path, capsys):
    """({name: tensor} of the network before, what is printed)."""
    save_network(source, tmp_path / 'source')
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    capsys.readouterr()
    transfer_weights(str(tmp_path / 'source'), net)
    return before, capsys.readouterr().out


def equal_names(net, state):
    return {name for name, tensor in net.state_dict().items() if name in state and torch.equal(tensor, state[name])}


@pytest.mark.parametrize('arch', TABLES)
def test_classes_are_new_and_no_label_is_kept(arch, tmp_path, capsys):
    """Its row is the last one of both tables."""
    source, net = archs.network(arch, label_dim=7), fresh(arch, label_dim=3)
    before, printed = transferred(source, net, tmp_path, capsys)
    table = f'model.{TABLES[arch]}.weight'
    found, theirs = net.state_dict()[table], source.state_dict()[table]
    assert found.shape[0] == 4 and torch.equal(found[:3], before[table][:3]) and torch.equal(found[3], theirs[7])
    assert equal_names(net, source.state_dict()) == set(before) - {table}
    assert ('; class embeddings are initialised at random: 7 classes there, 3 here, and the one of "no label" is kept\n') in printed
    assert 'Warning' not in printed


def test_tables_of_equal_size_can_mean_other_classes(tmp_path, capsys):
    """Four classes without a row for "no label" are not three classes with one."""
    source, net = archs.network('dit', label_dim=4, null_label=False), fresh('dit', label_dim=3)
    before, printed = transferred(source, net, tmp_path, capsys)
    table = 'model.y_embedder.embedding_table.weight'
    assert source.state_dict()[table].shape == before[table].shape and torch.equal(net.state_dict()[table], before[table])
    assert 'class embeddings are initialised at random: 4 classes there, 3 here\n' in printed


def test_an_unconditional_network_keeps_no_label(tmp_path, capsys):
    source, net = archs.network('dit', label_dim=7), fresh('dit', label_dim=0)
    before, printed = transferred(source, net, tmp_path, capsys)
    table = 'model.y_embedder.embedding_table.weight'
    assert equal_names(net, {**source.state_dict(), table: source.state_dict()[table][-1:]}) == set(before)
    assert 'class embeddings are left out: 7 classes there, none here, and the one of "no label" is kept' in printed


def test_linear_embeddings(tmp_path, capsys):
    """A U-Net has one vector for each class, and its bias for "no label"."""
    source, net = unets.tiny(label_dim=7), unets.tiny(label_dim=3, key='other')
    before, printed = transferred(source, net, tmp_path, capsys)
    assert equal_names(net, source.state_dict()) == set(before) - {'model.map_label.weight'}
    assert torch.equal(net.state_dict()['model.map_label.weight'], before['model.map_label.weight'])
    assert printed.endswith('; class embeddings are initialised at random: 7 classes there, 3 here\n')


def test_equal_classes_are_copied(tmp_path, capsys):
    source, net = archs.network('dit', label_dim=3), fresh('dit', label_dim=3)
    before, printed = transferred(source, net, tmp_path, capsys)
    assert equal_names(net, source.state_dict()) == set(before) and 'random' not in printed


@pytest.mark.parametrize('arch', TABLES)
def test_positions_belong_to_a_grid(arch, tmp_path, capsys):
    """Also where the grids have equally many places; those of DiT are computed."""
    source, net = archs.network(arch, img_resolution=8), fresh(arch, img_resolution=[4, 16])
    before, printed = transferred(source, net, tmp_path, capsys)
    assert torch.equal(net.state_dict()['model.pos_embed'], before['model.pos_embed'])
    assert equal_names(net, source.state_dict()) == set(before) - {'model.pos_embed'}
    told = '; positions are initialised at random: images of 8x8 there, 4x16 here\n' in printed
    assert told == (arch != 'dit') and ('random' in printed) == told
