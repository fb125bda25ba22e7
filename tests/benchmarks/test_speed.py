# SPDX-License-Identifier: Apache-2.0
"""benchmarks/speed.py and what it measures with: counted operations are those of the networks, turns alternate, every command runs."""

import json
import statistics

import pytest
import torch
from click.testing import CliRunner

from benchmarks import contestants, measure, speed
from tests.support import commands
from torch_utils import misc

CPU = torch.device('cpu')


@pytest.mark.parametrize('network, parameters, gflops', [
    ('cifar', 55.7e6, 42.4), pytest.param('ffhq', 61.8e6, 83.7, marks=pytest.mark.slow), ('imagenet', 296e6, 219)])
def test_counted_operations_of_published_networks(network, parameters, gflops):
    """A multiply-add counts 2; a backward pass costs twice a forward pass, less the first layer's gradient of the image."""
    found = contestants.count_network(contestants.network_config(contestants.SHAPES[network]))
    assert found[0] == pytest.approx(parameters, rel=5e-3) and found[1] == pytest.approx(gflops * 1e9, rel=0.02)
    assert found[2] == pytest.approx(3 * found[1], rel=1e-3)


def test_operations_are_counted_by_hand():
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1, device='meta')
    assert measure.count_flops(lambda: convolution(torch.zeros(2, 3, 8, 8, device='meta'))) == 2 * 2 * 64 * 5 * 27
    found = contestants.count_of(lambda: torch.nn.Linear(7, 4), lambda net: net(torch.zeros(3, 7)))
    assert found == (32, 2 * 3 * 28, 2 * 2 * 3 * 28)  # the input has no gradient


@pytest.mark.parametrize('name', [name for name, shape in contestants.SHAPES.items() if shape.diffusers])
def test_networks_of_the_peers_are_alike(name):
    """Parameters and operations within a third of ours, where a peer is installed."""
    pytest.importorskip('diffusers')
    shape, found = contestants.SHAPES[name], {}
    ours = contestants.count_network(contestants.network_config(shape))
    images = [x.to('meta') for x in contestants.inputs(contestants.network_config(shape))[:2]]
    found['diffusers'] = contestants.count_of(lambda: contestants.diffusers_network(shape), lambda net: net(*images).sample)
    if not contestants.missing():
        library = contestants.ddp_library()
        found['ddp'] = contestants.count_of(lambda: library.Unet(**shape.ddp), lambda net: net(*images))
    for theirs in found.values():
        assert all(2 / 3 < a / b < 3 / 2 for a, b in zip(theirs, ours))


def test_arms_take_turns():
    seen = []
    found = measure.in_turns({name: lambda name=name: seen.append(name) for name in 'ab'}, repeats=3, device=CPU, warmup=2)
    assert seen == [*'aabb', *'ababab'] and {name: len(spent) for name, spent in found.items()} == {'a': 3, 'b': 3}


def test_time_of_the_process_does_not_pass_while_it_sleeps():
    import time
    spent = measure.timed(lambda: time.sleep(0.05), CPU)
    assert spent.wall >= 0.05 > 0.04 > spent.cpu


def test_comparisons_are_paired_by_round():
    """The second contestant takes twice as long in every round, although rounds differ by a factor of 10."""
    row = lambda name, rates, flops: {'network': 'n', 'batch': 2, 'contestant': name, 'images_per_second': rates,
                                      'flops_per_second': [r * flops for r in rates], 'flops_per_cpu_second': [r * flops for r in rates]}
    found = speed.comparisons([row('a', [10.0, 1.0, 5.0], 3.0), row('b', [5.0, 0.5, 2.5], 12.0)])
    assert found == [{'network': 'n', 'batch': 2, 'first': 'a', 'other': 'b', 'per_flop': 0.5, 'per_flop_cpu': 0.5, 'per_image': 2.0}]


def test_measured_limits():
    assert measure.matrix_peak(CPU, torch.float32, 64, 0.01) > 1e7 and measure.copy_bandwidth(CPU, 2 ** 16, 0.01) > 1e6


def test_layouts():
    with misc.seeded('layout'):
        net = contestants.build_network(contestants.network_config(contestants.SHAPES['small']))
    assert contestants.layout_of(net) == 'nchw'
    for layout in ('nhwc', None, 'nhwc', 'nchw'):
        contestants.set_layout(net, layout)
        assert contestants.layout_of(net) == (layout or 'nhwc')


@pytest.fixture
def quick(monkeypatch):
    """Limits measured on small matrices."""
    monkeypatch.setattr(measure, 'MATRIX', {'cpu': 64})
    monkeypatch.setattr(measure, 'COPY', {'cpu': 2 ** 16})
    monkeypatch.setattr(measure, 'best', lambda function, device, seconds: measure.timed(function, device).wall)


def test_training_steps(tmp_path, quick):
    """The step that is measured is train.py's, for every combination of options and in the published settings."""
    text = commands.run(speed.main, 'training', '--device=cpu', '--network=small', '--batch=2', '--repeats=2', '--precision=default,bf16',
                        '--no-peers', '--traffic-mb=10', f'--json={tmp_path / "t.json"}')
    facts = json.loads((tmp_path / 't.json').read_text())
    names = [row['contestant'] for row in facts['rows']]
    assert names == ['this program', 'this program, precision=bf16', 'this program, published settings']
    assert [row['precision'] for row in facts['rows']] == ['fp32', 'bf16', 'fp32'] and all(name in text for name in names)
    for row in facts['rows']:
        assert len(row['images_per_second']) == 2 and row['layout'] == 'nchw' and not row['compile']
        rate = statistics.median(row['flops_per_second'])
        assert row['share_of_peak'] == pytest.approx(rate / facts['peak_flops'][row['precision']])
        assert row['flops_per_second'] == pytest.approx([r * row['flops_per_image'] for r in row['images_per_second']])
    assert facts['versions']['torch'] == torch.__version__ and 'cores' in facts['machine'] and len(facts['comparisons']) == 2


def test_peers_train(quick):
    """One step of each changes its weights."""
    pytest.importorskip('diffusers')
    for one in contestants.peer_trainers(contestants.SHAPES['small'], 2, CPU):
        parameters = [p for cell in one.step.__closure__ for p in getattr(cell.cell_contents, 'parameters', list)() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        one.step()
        one.step()  # the first one's learning rate is 0 in diffusers' warm-up
        assert parameters and any(not torch.equal(a, b) for a, b in zip(before, parameters))


def test_peers_sample_with_as_many_evaluations():
    pytest.importorskip('diffusers')
    for one in contestants.peer_samplers(contestants.SHAPES['small'], CPU):
        calls = []
        one.net.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            pixels = one.sample(2, 3)
        assert len(calls) == 3 and pixels.shape == (2, 16, 16, 3) and pixels.dtype == 'uint8'


def test_missing_peers_are_named(monkeypatch):
    monkeypatch.setattr(contestants.importlib.util, 'find_spec', lambda name: None)
    assert [line.split()[0] for line in contestants.missing()] == ['diffusers', 'denoising-diffusion-pytorch']
    assert contestants.peer_trainers(contestants.SHAPES['small'], 2, CPU) == []


def test_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, 'SHAPES', {name: contestants.SHAPES[name] for name in ('cifar', 'imagenet')})
    commands.run(speed.main, 'limits', '--device=cpu', '--seconds=0.01', '--size=64', '--tflops=790', f'--json={tmp_path / "l.json"}')
    facts = {row['network']: row for row in json.loads((tmp_path / 'l.json').read_text())['networks']}
    for network, training, sampling in [('cifar', 6200, 530), ('imagenet', 1200, 103)]:
        assert facts[network]['training_limit'] == pytest.approx(training, rel=0.03)
        assert facts[network]['sampling_limit'] == pytest.approx(sampling, rel=0.03)


def test_cost_of_presets():
    """200 million images of DDPM++ at half of 790 TFLOP/s: 3 * 42.25e9 * 2e8 / 395e12 / 3600 = 17.8 hours."""
    network, found = speed.preset_network('edm-cifar10-uncond')
    assert contestants.count_network(network)[0] == found['parameters']
    row = next(row for row in speed.costs(790, [0.5], 2.0, ['edm-cifar10-uncond']))
    assert row['hours']['0.5'] == pytest.approx(17.8, rel=0.01) and row['dollars']['0.5'] == pytest.approx(35.7, rel=0.01)


@pytest.mark.slow
def test_start(tmp_path):
    commands.run(speed.main, 'start', '--network=small', '--repeats=1', f'--json={tmp_path / "s.json"}')
    found = json.loads((tmp_path / 's.json').read_text())['seconds']
    assert found['train.py --help'][0] < found['train.py, one step'][0]


def test_unknown_networks_are_refused():
    assert 'choose from small' in commands.refused(speed.main, 'training', '--network=none')


def test_commands_of_the_group():
    assert CliRunner().invoke(speed.main, ['--help']).output.count('\n  ') >= 5
