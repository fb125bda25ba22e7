# SPDX-License-Identifier: Apache-2.0
"""Batches: in the order of the pair stream whatever the number of workers, rows or micro-batches, with errors that reach the caller."""

import numpy as np
import pytest
import torch

from tests.support import tiny
from torch_utils import misc
from training.data.batches import AHEAD, Feed, micro_batches
from training.data.pairs import PairStream
from training.diffusion.noise import NOISE

SIGMA_N = np.array([0, 0.3] * 10)
ITEMS = np.arange(20)[::-1].copy()  # places of the stream are not places of the store


class Store:
    """Images that tell their number; the batches asked for are counted."""

    def __init__(self, broken_from=10**9):
        self.calls, self.broken_from = 0, broken_from

    def gather(self, where):
        self.calls += 1
        if self.calls > self.broken_from:
            raise OSError('disk gone')
        return where.float().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def make_feed(workers=1, rows=slice(0, 8), store=None, labels=None):
    stream = PairStream(SIGMA_N[ITEMS], NOISE['lognormal'](), 'skip', batch=8, seed=1)
    return Feed(stream, store or Store(), ITEMS, sigma_n=SIGMA_N, raw_idx=np.arange(20) + 100, labels=labels, rows=rows,
                device='cpu', workers=workers)


def test_rows_belong_together():
    """Image, level, label and raw index of a row are those of one item, and sigma is above its level."""
    feed = make_feed(labels=torch.arange(20).float()[:, None])
    stream = PairStream(SIGMA_N[ITEMS], NOISE['lognormal'](), 'skip', batch=8, seed=1)
    for _ in range(10):
        host = feed.next()
        index, sigma = stream.next()
        where = ITEMS[index]
        assert np.array_equal(host.images[:, 0, 0, 0], where) and np.array_equal(host.raw_idx, where + 100)
        assert np.array_equal(host.class_labels[:, 0], where)
        np.testing.assert_allclose(host.sigma_n, SIGMA_N[where], rtol=1e-6)
        np.testing.assert_allclose(host.sigma, sigma, rtol=1e-6)
        assert (host.sigma > host.sigma_n).all()
        assert host.stream_state == stream.state()  # where the stream stood after this batch, not where the background is
    feed.close()


@pytest.mark.parametrize('workers', [0, 1, 4])
def test_workers_and_ranks_change_nothing(workers):
    whole = make_feed(workers=0)
    parts = [make_feed(workers, rows=slice(first, first + 4)) for first in (0, 4)]
    for _ in range(6):
        host, halves = whole.next(), [part.next() for part in parts]
        for column in range(len(host) - 1):
            if host[column] is not None:
                assert torch.equal(host[column], torch.cat([half[column] for half in halves]))
        assert all(half.stream_state == host.stream_state for half in halves)
    for part in parts:
        part.close()


def test_prepares_ahead_and_no_further():
    store = Store()
    feed = make_feed(store=store)
    feed.next()
    feed._pool.submit(lambda: None).result()  # behind all that was ordered
    assert store.calls == 1 + AHEAD
    feed.close()


def test_restored_stream_goes_on_where_it_stood():
    feed = make_feed()
    before = [feed.next() for _ in range(3)]
    after = [feed.next() for _ in range(3)]
    again = make_feed()
    again.stream.restore(before[-1].stream_state)
    assert tiny.digest([list(batch) for batch in after]) == tiny.digest([list(again.next()) for _ in range(3)])


@pytest.mark.parametrize('workers', [0, 1])
def test_errors_reach_the_caller(workers):
    feed = make_feed(workers, store=Store(broken_from=2))
    feed.next()
    feed.next()
    with pytest.raises(OSError, match='disk gone'):
        feed.next()
    feed.close()


def test_micro_batches_are_slices_with_their_own_draws():
    host = make_feed(workers=0).next()
    draws_of = lambda row: misc.Draws(3, 7, 40 + row)
    (whole, draws), = micro_batches(host, 8, 'cpu', draws_of)
    parts = list(micro_batches(host, 3, 'cpu', draws_of))
    assert [len(batch.images) for batch, _ in parts] == [3, 3, 2]
    for name in ('images', 'sigma_n', 'sigma', 'noise', 'raw_idx'):
        assert torch.equal(torch.cat([getattr(batch, name) for batch, _ in parts]), getattr(whole, name))
    assert torch.equal(whole.noise, draws('noise', whole.images.shape))
    assert whole.sigma.shape == whole.sigma_n.shape == (8, 1, 1, 1) and whole.class_labels is None
    assert torch.equal(torch.cat([randn('x', [len(batch.images), 2]) for batch, randn in parts]), draws('x', [8, 2]))


@pytest.mark.parametrize('labels', [torch.arange(20), torch.randn(20, 3)])
def test_classes_are_whole_numbers_until_they_are_on_the_device(labels):
    host = make_feed(workers=0, labels=labels).next()
    where = host.raw_idx - 100
    assert torch.equal(host.class_labels, labels[where])
    (batch, _), = micro_batches(host, 8, 'cpu', lambda row: misc.Draws(3, 7, row), label_dim=20)
    want = labels[where] if labels.ndim == 2 else torch.eye(20)[where]
    assert torch.equal(batch.class_labels, want) and batch.class_labels.dtype == torch.float32
