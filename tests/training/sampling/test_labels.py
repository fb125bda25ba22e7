# SPDX-License-Identifier: Apache-2.0
"""Where the labels of images come from: one class, uniform, a data set's distribution, a file; none moves a seed's other draws."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support import GOLDEN
from tests.support import tiny as tiny_run
from tests.support.unets import all_images, tiny
from training.sampling import labels
from training.sampling.generate import SeededDraws

PUBLISHED = load_file(GOLDEN / 'samplers' / 'stacked_rng.safetensors')


@pytest.fixture
def net():
    return tiny(label_dim=3)


def write(path, content):
    """A file of labels, in the format of its name."""
    if path.suffix == '.npy':
        np.save(path, content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def told(source, seeds):
    return source(SeededDraws(seeds), seeds)


@pytest.mark.parametrize('source', [labels.uniform(10), labels.one_class(3), labels.drawn(torch.arange(50000)),
                                    labels.listed(torch.ones(4, 7))])
def test_every_source_leaves_the_published_draws_as_they_are(source):
    draws = SeededDraws([0, 1, 2, 3])
    latents = draws.randn([3, 32, 32])
    source(draws, [0, 1, 2, 3])
    assert torch.equal(draws.randn_like(latents.double()), PUBLISHED['32x32.randn_like_f64_after'])
    assert torch.equal(draws.randn_like(latents.double()), PUBLISHED['32x32.randn_like_f64_second'])


def test_uniform_draws_the_published_classes():
    draws = SeededDraws([0, 1, 2, 3])
    draws.randn([3, 32, 32])
    assert torch.equal(labels.uniform(10)(draws, [0, 1, 2, 3]), PUBLISHED['32x32.labels'])


def test_a_seed_has_its_row_of_a_file_whatever_the_other_seeds(net, tmp_path):
    for path in (write(tmp_path / 'a.npy', np.array([2, 0, 1, 1])), write(tmp_path / 'a.json', [2, 0, 1, 1]),
                 write(tmp_path / 'a.txt', '2\n0\n1\n\n1\n')):
        source = labels.pick(net, [3, 0, 1], path)
        assert told(source, [3, 0, 1]).tolist() == [1, 2, 0] and told(source, [3, 0, 1]).dtype == torch.int64
        assert told(labels.pick(net, [1], path), [1]).tolist() == [0]


def test_vectors_of_a_file(net, tmp_path):
    rows = [[0.5, 0.25, 0.25], [0, 0, 1]]
    for path in (write(tmp_path / 'a.npy', np.array(rows)), write(tmp_path / 'a.json', rows),
                 write(tmp_path / 'a.txt', '.5 .25, .25\n0 0 1')):
        found = told(labels.pick(net, [1, 0], path), [1, 0])
        assert found.dtype == torch.float32 and found.tolist() == rows[::-1]
    # One-hot rows are their classes.
    one_hot = labels.pick(net, [0, 1], write(tmp_path / 'b.npy', np.eye(3)[[2, 1]]))
    classes = labels.pick(net, [0, 1], write(tmp_path / 'c.npy', np.array([2, 1])))
    assert torch.equal(all_images(net, [0, 1], labels=one_hot), all_images(net, [0, 1], labels=classes))


def test_one_number_a_row_for_networks_that_take_one(tmp_path):
    net = tiny(label_dim=1)
    source = labels.pick(net, [0, 1], write(tmp_path / 'a.txt', '0.5\n-2'))
    assert told(source, [0, 1]).tolist() == [[0.5], [-2.0]]
    found = all_images(net, [0, 1], labels=source)
    assert torch.equal(found, all_images(net, [0, 1], labels=source, batch=1))


def test_labels_of_a_data_set_come_as_often_as_they_are(net, tmp_path):
    """64 images: 22, 21, 21 of the classes; and a data set with one class in 10, 4,000 draws: within 4 standard deviations."""
    data = tiny_run.make_zip(tmp_path / 'data.zip')
    table = labels.of_dataset(data, 3)
    assert table.bincount().tolist() == [22, 21, 21]
    rare = torch.tensor([0] * 9 + [1])
    share = told(labels.drawn(rare), list(range(4000))).double().mean().item()
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5
    picked = labels.pick(net, [0], f'dataset:{data}')
    assert told(picked, [5, 6]).tolist() == told(picked, [6, 5]).tolist()[::-1]


@pytest.mark.parametrize('name, content, words', [
    ('a.npy', np.array([0, 3]), 'classes are 0 to 3, and the network has 0 to 2'),
    ('a.npy', np.array([0, -1]), 'classes are -1 to 0'),
    ('a.npy', np.array([0.5, 1.5]), 'whole numbers'),
    ('a.npy', np.array(['a', 'b']), 'not plain numbers'),
    ('a.npy', np.zeros([0]), 'whole numbers'),
    ('a.npy', np.zeros([2, 4]), 'rows have 4 numbers, and the network takes 3'),
    ('a.npy', np.zeros([2, 1, 3]), r'\[2, 1, 3\]'),
    ('a.npy', np.array([[0, 0, 1], [0, np.nan, 0]]), 'row 1 is not finite'),
    ('a.npy', np.array([0]), 'seeds 0 to 0, and none for seed 1'),
    ('a.json', [[1, 2, 3], [1]], 'cannot be read'),
    ('a.json', '[1, 2', 'cannot be read'),
    ('a.json', {'0': 1}, 'whole numbers'),
    ('a.txt', '0\none\n', 'cannot be read'),
    ('a.csv', '0\n1\n', '.npy, .json or .txt'),
])
def test_files_that_are_refused(net, tmp_path, name, content, words):
    with pytest.raises(ValueError, match=words) as error:
        labels.pick(net, [0, 1], write(tmp_path / name, content))
    assert '\n' not in str(error.value)


def test_other_mistakes(net, tmp_path):
    for spec, class_idx, of, words in ((None, 3, net, 'classes 0 to 2'), ('uniform', 1, net, 'exclude each other'),
                                       (None, 0, tiny(), 'unconditional'), ('uniform', None, tiny(), 'unconditional'),
                                       ('nowhere.npy', None, net, 'no such file; choose uniform')):
        with pytest.raises(ValueError, match=words):
            labels.pick(of, [0], spec, class_idx)
    (tmp_path / 'pickle.npy').write_bytes(b'\x80\x04N.')
    np.savez(tmp_path / 'arrays.npz', np.zeros(2, int))
    (tmp_path / 'arrays.npz').rename(tmp_path / 'arrays.npy')
    for name in ('pickle', 'arrays'):
        with pytest.raises(ValueError, match='cannot be read'):
            labels.pick(net, [0], str(tmp_path / f'{name}.npy'))
    assert labels.pick(tiny(), [0]) is None


def test_a_data_set_without_labels_is_refused(net, tmp_path):
    from PIL import Image
    Image.new('L', [8, 8]).save(tmp_path / 'a.png')
    with pytest.raises(ValueError, match='no labels in its dataset.json'):
        labels.pick(net, [0], f'dataset:{tmp_path}')
