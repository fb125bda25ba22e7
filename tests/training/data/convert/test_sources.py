# SPDX-License-Identifier: Apache-2.0
"""Several sources in one set, with the labels and levels of each; what they are told on the command line, and what is refused."""

import json
import pickle

import numpy as np
import pytest

from dnnlib import UserError
from tests.test_dataset_tool import convert, members, picture_folder, pictures, refusal, run
from training.data.convert import sources, transforms
from training.data.convert.readers.source import Kind, Source
from training.data.dataset import ImageDataset


def meta_of(path):
    return json.loads(members(path)[2])


def column(path, key):
    return [value for _, value in meta_of(path)[key]]


@pytest.fixture
def folders(tmp_path):
    """Two folders of 3 and 2 images, some of whose names are the same."""
    picture_folder(tmp_path / 'clean', pictures(3))
    picture_folder(tmp_path / 'noisy', pictures(2, seed=1))
    return tmp_path


def test_clean_and_noisy_folders_in_one_set(folders):
    convert(f'{folders}/clean:label=cat', folders / 'x.zip', f'--source={folders}/noisy:sigma=0.2,label=ape')
    dataset = ImageDataset(str(folders / 'x.zip'), use_labels=True)
    wanted = [*pictures(3), *pictures(2, seed=1)]
    assert len(dataset) == 5 and all((dataset.decode(i) == image.transpose(2, 0, 1)).all() for i, image in enumerate(wanted))
    assert dataset.native_sigma.tolist() == [0, 0, 0, 0.2, 0.2] and dataset.classes.tolist() == [1, 1, 1, 0, 0]


def test_every_level_of_a_source(folders):
    (folders / 's.csv').write_text('00.png,0.1\n01.png,0.3\n')
    convert(f'{folders}/clean:sigma_max=0.5', folders / 'x.zip', f'--source={folders}/noisy:sigma={folders}/s.csv,sigma_min=0.7')
    assert column(folders / 'x.zip', 'sigmas') == [0, 0, 0, 0.1, 0.3]
    assert column(folders / 'x.zip', 'sigma_min') == [None] * 3 + [0.7] * 2
    assert column(folders / 'x.zip', 'sigma_max') == [0.5] * 3 + [None] * 2
    convert(folders / 'x.zip', folders / 'again.zip', '--part=1/2')
    assert column(folders / 'again.zip', 'sigma_min') == [None, 0.7]


def test_lower_limits(folders):
    (folders / 'm.json').write_text(json.dumps({'sigma_min': {'00.png': None, '01.png': 0.0, '02.png': 0.3}}))
    convert(folders / 'clean', folders / 'x.zip', f'--sigma_min={folders}/m.json')
    assert column(folders / 'x.zip', 'sigma_min') == [None, None, 0.3]  # a limit of 0 is none
    convert(folders / 'clean', folders / 'y.zip', '--sigma-min=0.4')
    assert column(folders / 'y.zip', 'sigma_min') == [0.4] * 3
    line = refusal(f'--source={folders}/clean', f'--dest={folders}/z.zip', '--sigma-min=-1')
    assert '--sigma-min' in line and 'lower limits must be 0 or more' in line


def test_class_names_of_folders_and_of_sources_are_numbered_together(folders):
    picture_folder(folders / 'tree', pictures(2), ['cat/0.png', 'elk/0.png'])
    said = convert(folders / 'tree', folders / 'x.zip', f'--source={folders}/clean:label=dog')
    assert 'Classes: 0 cat, 1 dog, 2 elk' in said and column(folders / 'x.zip', 'labels') == [0, 2, 1, 1, 1]
    convert(f'{folders}/clean:label=4', folders / 'y.zip', f'--source={folders}/noisy:label=7')
    assert column(folders / 'y.zip', 'labels') == [4, 4, 4, 7, 7]
    convert(f'{folders}/tree:label=none', folders / 'z.zip', f'--source={folders}/clean')
    assert meta_of(folders / 'z.zip')['labels'] is None


def test_tables_go_by_the_names_of_all(folders):
    """Equal names have the name of their source before them."""
    rows = [('clean/00.png', 1, 0.1), ('noisy/01.png', 5, 0.5), ('noisy/00.png', 4, 0.4), ('clean/02.png', 3, 0.3),
            ('clean/01.png', 2, 0.2)]
    for name, column_of in (('l.csv', 1), ('s.csv', 2)):
        (folders / name).write_text('\n'.join(f'{row[0]},{row[column_of]}' for row in rows))
    convert(folders / 'clean', folders / 'x.zip', f'--source={folders}/noisy:label=dog', f'--labels={folders}/l.csv',
            f'--sigmas={folders}/s.csv')
    assert column(folders / 'x.zip', 'labels') == [1, 2, 3, 4, 5]
    assert column(folders / 'x.zip', 'sigmas') == [0.1, 0.2, 0.3, 0.4, 0.5]
    twice = sources.open_sources([f'{folders}/clean'] * 2)
    assert twice.names == ['clean/00.png', 'clean/01.png', 'clean/02.png', 'clean-2/00.png', 'clean-2/01.png', 'clean-2/02.png']


def test_names_of_classes_that_are_none(folders):
    for odd in ('null', '["b"]', '{}'):
        (folders / 'l.json').write_text(f'{{"00.png": "a", "01.png": {odd}, "02.png": "c"}}')
        line = refusal(f'--source={folders}/clean', f'--dest={folders}/x.zip', f'--labels={folders}/l.json')
        assert 'names of classes' in line and odd in line
    (folders / 'l.csv').write_text('\n'.join(f'{i:02}.png,class {i}' for i in range(3)))
    assert 'Classes: 0 class 0, 1 class 1, 2 class 2' in convert(folders / 'clean', folders / 'x.zip', f'--labels={folders}/l.csv')


def test_units_of_several_sources(tmp_path):
    for i, offset in enumerate((0, 10)):
        np.save(tmp_path / f'{i}.npy', np.random.default_rng(i).normal(offset, 1, (4, 8, 8)).astype(np.float32))
        convert(tmp_path / f'{i}.npy', tmp_path / f'{i}.zip', f'--units={offset},2', '--layout=nhw')
    pair = [f'--source={tmp_path}/0.zip', f'--source={tmp_path}/1.zip', f'--dest={tmp_path}/x.zip', '--workers=1']
    assert 'units differ' in refusal(*pair) and '--units=OFFSET,SCALE' in refusal(*pair)
    assert run(*pair, '--units=5,4').exit_code == 0
    assert meta_of(tmp_path / 'x.zip')['units'] == {'offset': 5, 'scale': 4}
    convert(tmp_path / '0.npy', tmp_path / 'y.zip', f'--source={tmp_path}/1.npy')  # proposed for both together
    values = np.concatenate([np.load(tmp_path / f'{i}.npy') for i in range(2)])
    units = meta_of(tmp_path / 'y.zip')['units']
    np.testing.assert_allclose([units['offset'], units['scale']], [values.mean(), 2 * values.std()], rtol=1e-5)


def test_paths_with_colons(tmp_path):
    for name in ('a:b', 'a:key=1'):
        picture_folder(tmp_path / name, pictures(2))
        convert(tmp_path / name, tmp_path / 'x.zip')
    convert(f'{tmp_path}/a:b:sigma=0.3', tmp_path / 'x.zip')
    assert column(tmp_path / 'x.zip', 'sigmas') == [0.3, 0.3]
    assert sources.parse_source('hf://owner/name') == ('hf://owner/name', {})
    assert sources.parse_source('hf://owner/name:split=test') == ('hf://owner/name', {'split': 'test'})


def test_a_joined_source_goes_to_other_processes(folders):
    one = sources.open_sources([f'{folders}/clean', f'{folders}/noisy:sigma=0.2'])
    one.read(4)
    other = pickle.loads(pickle.dumps(one))
    assert other.names == one.names and other.sigmas == one.sigmas
    assert all((other.read(i) == one.read(i)).all() and other.kind(i) == one.kind(i) for i in range(5))


def test_refused_sources(folders):
    picture_folder(folders / 'tree', pictures(2), ['a/0.png', 'b/0.png'])
    np.savez(folders / 'numbers.npz', images=pictures(2), labels=[1, 2])
    np.savez(folders / 'vectors.npz', images=pictures(2), labels=[[0.5, 1], [1, 2]])
    np.save(folders / 'float.npy', np.zeros([2, 3, 8, 8], np.float32))
    dest, clean = f'--dest={folders}/x.zip', f'--source={folders}/clean'
    for args, texts in [
            ([f'{clean}:label=a', f'--source={folders}/noisy'], ['names of classes', 'no labels', 'label=NAME', '--labels']),
            ([f'{clean}:label=a', f'--source={folders}/noisy:label=1'], ['names of classes', 'class numbers']),
            ([f'--source={folders}/tree', f'--source={folders}/numbers.npz:layout=nhwc'], ['names of classes', 'class numbers']),
            ([f'--source={folders}/numbers.npz', f'--source={folders}/vectors.npz', '--layout=nhwc'], ['vectors', 'class numbers']),
            ([f'--source={folders}/float.npy:layout=nchw', clean], ['clean has 8-bit images', 'float.npy has others']),
            ([f'{clean}:colour=red'], ['"files" has no key "colour"', 'it takes no keys']),
            ([f'{clean}:label=a,b'], ['expected key=value', 'got "b"']), ([f'{clean}:label='], ['label=']),
            ([f'{clean}:kind=tar9'], ['unknown kind "tar9"', 'choose from', 'files']), ([f'{clean}:sigma=x'], ['sigma=x: neither']),
            ([f'{clean}:sigma=-1'], ['levels must be 0 or more']), ([clean, '--layout=nhwc'], ['--layout=nhwc', 'numpy']),
            ([f'--source={folders}/numbers.npz:layout=xyz'], ['layout=xyz is unknown; choose from nhw, nhwc, nchw']),
            ([f'--source={folders}/none:sigma=1'], ['no such file'])]:
        line = refusal(*args, dest)
        assert all(text in line for text in texts), line
    assert not (folders / 'x.zip').exists()


def test_every_entry_keeps_the_interface(tmp_path):
    """matches() never fails, and takes none for its own that another must tell of."""
    (tmp_path / 'odd.bin').write_bytes(b'\0' * 10)
    for name, piece in sources.SOURCES.items():
        assert issubclass(piece, Source), name
        assert not any(piece.matches(path) for path in (str(tmp_path / 'odd.bin'), str(tmp_path / 'none'), '', 'x' * 5000))
    with pytest.raises(UserError, match='not a folder'):
        sources.open_source(str(tmp_path / 'odd.bin'))


class Stripes(Source):
    """Images that grow brighter, made as they are read."""

    what = 'stripes'

    def __init__(self, path, count=3):
        self.names, self.labels, self._count = [f'{i}' for i in range(count)], [i % 2 for i in range(count)], count

    @staticmethod
    def matches(path):
        return str(path) == 'stripes'

    def kind(self, index):
        return Kind(1, 4, 4, True, 'L')

    def read(self, index):
        return np.full([1, 4, 4], 255 * index // self._count, np.uint8)


def test_a_source_and_a_transform_of_your_own(tmp_path, monkeypatch):
    """As docs/extending.md has it: a line in each registry, and the command line knows them."""
    monkeypatch.setitem(sources.SOURCES, 'stripes', Stripes)
    monkeypatch.setitem(transforms.TRANSFORMS, 'negative', negative)
    convert('stripes:count=5', tmp_path / 'x.zip', '--transform=negative:add=1', '--resolution=4x4')
    dataset = ImageDataset(str(tmp_path / 'x.zip'), use_labels=True)
    assert [int(dataset.decode(i)[0, 0, 0]) for i in range(5)] == [255 - 51 * i for i in range(5)]
    assert dataset.classes.tolist() == [0, 1, 0, 1, 0]


def negative(image, width, height, *, add=0):
    return (254 + add - image).astype(np.uint8)
