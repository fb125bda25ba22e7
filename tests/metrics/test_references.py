# SPDX-License-Identifier: Apache-2.0
"""References by path and URL: digests, what they were made with, and what is told of them."""

import json

import numpy as np
import pytest
import torch

from dnnlib import UserError
from dnnlib.files import file_digest
from metrics import detectors, evaluate, references
from metrics.image_files import ImageFiles
from metrics.statistics import Statistics, load_statistics, save_statistics
from torch_utils import misc

SHAPE = (3, 4, 4)


@pytest.fixture
def stats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez('ref.npz', mu=np.zeros(48), sigma=np.eye(48))
    return tmp_path


def test_a_digest_is_checked_before_anything_is_read(stats, monkeypatch):
    digest = file_digest('ref.npz')
    for given in (digest, digest.upper(), digest[:8]):
        assert references.fetch(f'ref.npz#sha256={given}') == 'ref.npz'
    found, told = references.open_reference(f'ref.npz#sha256={digest}', None, 'pixels', False)
    assert told == digest and len(found.mean) == 48
    monkeypatch.setattr(references, 'load_statistics', lambda *args: pytest.fail('read'))
    with pytest.raises(UserError, match=f'^--ref-stats=ref.npz: SHA-256 is {digest}, expected {"0" * 64};'):
        references.open_reference(f'ref.npz#sha256={"0" * 64}', None, 'pixels', False)


@pytest.mark.parametrize('digest', ['', 'abc', 'x' * 64, '0' * 65])
def test_what_is_no_digest(stats, digest):
    with pytest.raises(UserError, match=r'--ref-stats=ref.npz#sha256=.* expected 8 to 64 hexadecimal digits'):
        references.fetch(f'ref.npz#sha256={digest}')


def test_a_digest_of_a_url(stats, monkeypatch):
    monkeypatch.setenv('AMBIENT_CACHE', str(stats / 'cache'))
    monkeypatch.setattr('dnnlib.download.is_url', lambda ref: str(ref).startswith('file:'))  # urllib's own offline scheme
    url = (stats / 'ref.npz').as_uri()
    with pytest.raises(UserError, match=f'^--ref-stats={url}: SHA-256 is .* the download was deleted'):
        references.fetch(f'{url}#sha256={"0" * 64}')
    path = references.fetch(f'{url}#sha256={file_digest("ref.npz")}')
    assert file_digest(path) == file_digest('ref.npz')
    with pytest.raises(UserError, match='SHA-256'):  # what is in the cache is checked too
        references.fetch(f'{url}#sha256={"0" * 64}')


def test_a_file_that_is_not_there(stats):
    with pytest.raises(UserError, match='^--ref-stats=none.pkl: no such file$'):
        references.fetch('none.pkl')


# What they were made with


def test_conditions_are_kept_and_told(tmp_path):
    """Through the file, and into what a result says."""
    np.save(tmp_path / 'a.npy', np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8))
    found = references.statistics_of(ImageFiles(tmp_path / 'a.npy', '--data'), detectors.pixel_detector('cpu'), 2, False)
    save_statistics(found, tmp_path / 'r.npz')
    again = load_statistics(tmp_path / 'r.npz')
    assert (again.device, again.tf32, again.shape, again.note) == ('cpu', False, SHAPE, None)
    told = references.facts(again, 'r.npz', 'd')
    assert told['versions'] == misc.versions() and told['device'] == 'cpu' and told['tf32'] is False and told['path'] == 'r.npz'
    json.dumps(told)


@pytest.mark.parametrize('facts, words', [
    ({}, []), ({'device': 'cpu', 'tf32': False, 'shape': SHAPE, 'versions': '{"torch": "1"}'}, []),
    ({'note': 'nobody knows'}, ['nobody knows; it is compared because the dimensions agree']),
    ({'device': 'NVIDIA A100'}, ['made on NVIDIA A100, compared on cpu']), ({'tf32': True}, ['made with TF32, compared without']),
    ({'shape': (1, 8, 6)}, ['made from [1, 8, 6] images, compared with [3, 4, 4]']),
    ({'device': 'x', 'tf32': True}, ['made on x', 'with TF32'])])
def test_differences_are_warned_of(capsys, facts, words):
    references.warn(Statistics(np.zeros(1), np.eye(1), **facts), detectors.pixel_detector('cpu'), SHAPE, '--ref-stats=r')
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(words)
    assert all(line.startswith('Warning: --ref-stats=r: ') and word in line for line, word in zip(lines, words))


def test_images_of_another_shape_are_refused_whatever_the_detector():
    """8x8 grey images against 16x16 RGB ones, in features of the same number."""
    detector = detectors.Detector('toy', lambda images: images.flatten(2).double().mean(2), 'cpu')
    reference = Statistics(np.zeros(3), np.eye(3), detector='toy', shape=(3, 16, 16))
    with pytest.raises(UserError) as caught:
        evaluate.check_reference(reference, detector, (1, 8, 8), '--ref-stats=r')
    assert caught.value.message == ('--ref-stats=r: made from [3, 16, 16] images, these are [1, 8, 8] [C,H,W]; pass a reference of such '
                                    'images, or --other-shape to compare them all the same')
    evaluate.check_reference(reference, detector, (1, 8, 8), '--ref-stats=r', other_shape=True)
    pixels = Statistics(np.zeros(48), np.eye(48), detector='pixels', shape=(3, 2, 8))
    with pytest.raises(UserError, match='made from'):  # their pixels are not those of the same places
        evaluate.check_reference(pixels, detectors.pixel_detector('cpu'), SHAPE, 'r', other_shape=True)


@pytest.mark.parametrize('before', [(True, True), (False, True), (True, False)])
def test_detectors_do_not_use_tf32(before):
    """Whatever the process does, which is as it was afterwards, also behind a failure."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    state, seen = (cudnn.allow_tf32, matmul.allow_tf32), []

    def net(images):
        seen.append((cudnn.allow_tf32, matmul.allow_tf32))
        if len(images) > 1:
            raise ValueError
        return images.flatten(1).float()

    try:
        cudnn.allow_tf32, matmul.allow_tf32 = before
        detector = detectors.Detector('toy', net, 'cpu')
        detector(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
        with pytest.raises(ValueError):
            detector(torch.zeros(2, 3, 2, 2, dtype=torch.uint8))
        assert seen == [(False, False)] * 2 and (cudnn.allow_tf32, matmul.allow_tf32) == before and detector.tf32 is False
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = state
