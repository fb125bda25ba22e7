# SPDX-License-Identifier: Apache-2.0
"""benchmarks/sampling.py: its arms make the same images, it counts what it says, and it prints one line per arm."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from benchmarks import sampling

CPU = torch.device('cpu')


def test_the_arms_make_the_same_images(tmp_path):
    net = sampling.make_network('small', CPU, 'fp32', False)
    arms = {'plain': sampling.plain_loop, 'threads': sampling.ours, 'none': lambda *work: sampling.ours(*work, threads=0)}
    for name, arm in arms.items():
        (tmp_path / name).mkdir()
        arm(net, 5, 2, 3, str(tmp_path / name))
    pixels = {name: np.stack([np.asarray(PIL.Image.open(path)) for path in sorted((tmp_path / name).iterdir())]) for name in arms}
    assert pixels['plain'].shape == (5, 16, 16, 3) and pixels['plain'].std() > 20
    assert np.array_equal(pixels['threads'], pixels['none'])
    # The plain loop calls the network with other batch sizes, which moves a few pixels over a grey level's edge.
    assert np.abs(pixels['plain'].astype(int) - pixels['none']).max() <= 1


def test_counted_operations():
    """A 3x3 convolution of the first layer alone is 2 * 9 * 3 * 32 * 256 operations; all are 2N - 1 times those of one call."""
    net = sampling.make_network('small', CPU, 'fp32', False)
    one, many = (sampling.flops_per_image(net, steps) for steps in (1, 18))
    assert many == 35 * one > 35 * 2 * 9 * 3 * 32 * 256


def test_what_it_prints(tmp_path, capsys):
    sampling.main(['--images=4', '--batch=2', '--steps=1', '--repeats=2', '--peak-tflops=0.1', f'--json={tmp_path / "b.json"}'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('small network, 4 images, batch 2, 1 Heun steps, fp32;') and 'torch' in lines[0]
    assert len(lines) == 7 and all('images/s' in line and 'of the limit' in line for line in lines[1:4])
    facts = json.loads((tmp_path / 'b.json').read_text())
    rows, limit = facts['rows'], 0.1e12 / facts['rows'][0]['flops_per_image']
    assert lines[4].endswith(f'GFLOP per image; the limit at 0.1 TFLOP/s is {limit:,.0f} images/s')
    for line, row in zip(lines[1:4], rows):
        values = row['images_per_second']
        shown = float(line.split(' images/s')[0].split()[-1].replace(',', ''))
        assert len(values) == 2 and shown == pytest.approx(sum(values) / 2, abs=0.06)
        assert row['flops_per_second'] == pytest.approx([rate * row['flops_per_image'] for rate in values])
    assert [found['other'] for found in facts['comparisons']] == [row['contestant'] for row in rows[1:]]


def test_published_settings_take_part(monkeypatch):
    monkeypatch.setattr(sampling.contestants, 'peer_samplers', lambda *options: [])
    arms, work = sampling.entrants(sampling.parse(['--peers', '--steps=1']), CPU)
    assert list(arms)[-1] == 'published settings' and len(set(work.values())) == 1 and arms.keys() == work.keys()
