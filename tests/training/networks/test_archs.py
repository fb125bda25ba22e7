# SPDX-License-Identifier: Apache-2.0
"""The architectures beside the U-Nets: as a network (labels, rows, precision, compiler, recomputed blocks, rectangles), in training with
every preconditioning and objective, resumed, averaged, saved and sampled."""

import copy
import itertools

import pytest
import torch

from dnnlib import UserError
from tests.support import archs, tiny
from tests.support.archs import TINY, VARIANTS
from torch_utils import checkpoint, misc, registry
from training.checkpoints.diffusers import difference
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.data.pairs import PAIRINGS
from training.diffusion.noise import NOISE
from training.networks import rows
from training.networks.conditioning import CEP
from training.networks.interface import ARCHS
from training.networks.preconditioning import PRECONDS, build_network
from training.objective.penalty import PENALTIES
from training.objective.weighting import WEIGHTS
from training.sampling.generate import ConditionedDenoiser, generate_images

EACH = pytest.mark.parametrize('arch', [*TINY, *VARIANTS])
TRAINED = pytest.mark.parametrize('arch', TINY)


def batch(count=4, shape=(2, 8, 8), seed=0):
    """x, sigma, labels, augment labels."""
    draw = lambda name, *size: torch.randn(*size, generator=misc.generator(seed, name))
    return draw('x', count, *shape), draw('sigma', count).exp(), torch.eye(3)[torch.arange(count) % 3], draw('augment', count, 9)


# The network


@EACH
@pytest.mark.parametrize('precond', PRECONDS)
def test_conditions_matter_and_their_absence_is_defined(arch, precond):
    """Noise level, class and augmentation, where the network takes it, change the output; one row of labels serves all images; "no label"
    is zeros."""
    net = archs.network(arch, precond=precond, **archs.augmented(arch))
    x, sigma, labels, augment = batch()
    with torch.no_grad():
        out, far = net(x, sigma, labels), lambda a, b: (a - b).abs().amax(dim=(1, 2, 3)).min() > 1e-3
        assert out.shape == x.shape and out.dtype == torch.float32
        assert far(net(x, sigma, labels.roll(1, 1)), out) and (far(net(x, sigma, labels, augment), out) or not net.augment_dim)
        assert far(*(net.model(x, torch.full([4], level), labels) for level in (0.3, 170.8)))
        torch.testing.assert_close(net(x, sigma, labels[:1]), net(x, sigma, labels[:1].expand(4, -1)))
        assert torch.equal(net(x, sigma), net(x, sigma, torch.zeros(1, 3)))
        assert torch.equal(net(x, sigma, labels, torch.zeros(4, 9)), out)


@EACH
def test_every_parameter_is_used(arch):
    net = archs.network(arch, **archs.augmented(arch)).train()
    x, sigma, labels, augment = batch(8)
    labels[:2] = 0
    net(x, sigma, labels, augment).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize('arch', [arch for arch in TINY if arch != 'edm2'])
def test_sizes_for_small_photographs(arch):
    """The plain name is a network for 32x32 pixels; that of EDM2 is the published S."""
    with torch.device('meta'):
        net = build_network({'img_resolution': 32, 'img_channels': 3, **registry.build(arch, ARCHS)()})
    assert 1e7 < sum(p.numel() for p in net.parameters()) < 1.5e8


@EACH
def test_copies_and_sketches(arch):
    """A deep copy, and a network built without memory that takes the weights, give the same pixels."""
    net, (x, sigma, labels, _) = archs.network(arch), batch()
    with torch.device('meta'):
        sketch = build_network(net.config)
    assert all(tensor.is_meta for tensor in sketch.state_dict().values())
    sketch.load_state_dict(net.state_dict(), assign=True)
    with torch.no_grad():
        expected = net(x, sigma, labels)
        for other in (copy.deepcopy(net), sketch.eval()):
            assert torch.equal(other(x, sigma, labels), expected)


@EACH
def test_bfloat16_inside_is_close_to_float32(arch):
    net = archs.network(arch).requires_grad_(False)
    x, _, labels, _ = batch(8)
    exact, rough = (net.model(x.to(dtype), torch.full([8], 500.0), labels) for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.bfloat16
    assert 1e-4 < (rough.float() - exact).square().mean().sqrt() / exact.std() < 0.03


def trained(net, compiled=False, checkpointing=False, first=0, count=8):
    """Gradients and output of a network in training, with label dropout and perturbation by the rows of the global batch."""
    net = copy.deepcopy(net).train()
    net.model.checkpointing = checkpointing
    net.model.label_embedding.perturb = registry.build('gaussian', CEP, '--cep')
    rows.attach_row_draws(net).begin(misc.Draws(0, 1, first), count)
    net.zero_grad()
    if compiled:
        net.model.compile(fullgraph=True, backend=compiled)
    inputs = [tensor[first:first + count] for tensor in batch(8)]
    out = net(*inputs)
    out.square().sum().backward()
    return out.detach(), [p.grad for p in net.parameters()]


@EACH
def test_rows_have_their_own_draws(arch):
    """Half a batch gives half the outputs: label dropout and perturbation belong to the row of the global batch."""
    net = archs.network(arch, **archs.augmented(arch), label_dropout=0.4)
    whole, _ = trained(net)
    halves = torch.cat([trained(net, first=first, count=4)[0] for first in (0, 4)])
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(*batch(8)), whole, atol=1e-3)


@EACH
def test_dropped_label_is_no_label(arch):
    net, n = archs.network(arch, label_dropout=0.25).requires_grad_(False), 400
    x, sigma, _, _ = (tensor[:1].expand(n, *tensor.shape[1:]) for tensor in batch())
    labels = torch.eye(3)[torch.arange(n) % 3]
    with_label, without = net(x, sigma, labels), net(x, sigma)
    with misc.seeded('label dropout'):
        out = net.train()(x, sigma, labels)
    near = lambda a, b: (a - b).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert not near(with_label, without).any() and torch.equal(near(out, without), ~near(out, with_label))
    assert abs(near(out, without).float().mean() - 0.25) < 4.5 * (0.25 * 0.75 / n) ** 0.5


@EACH
def test_recomputed_blocks_give_the_same_gradients(arch):
    net = archs.network(arch, **archs.augmented(arch), label_dropout=0.4)
    kept, recomputed = trained(net), trained(net, checkpointing=True)
    assert torch.equal(kept[0], recomputed[0]) and all(torch.equal(a, b) for a, b in zip(kept[1], recomputed[1]))


@pytest.mark.parametrize('arch', [*TINY, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)])
@pytest.mark.parametrize('checkpointing', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_network_is_one_graph_for_the_compiler(arch, checkpointing):
    net = archs.network(arch, **archs.augmented(arch), label_dropout=0.4)
    expected, found = trained(net), trained(net, compiled='eager', checkpointing=checkpointing)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@TRAINED
@pytest.mark.slow
def test_compiled_network_gives_the_same_gradients(arch):
    net = archs.network(arch, **archs.augmented(arch), label_dropout=0.4)
    torch.testing.assert_close(trained(net, compiled='inductor'), trained(net), rtol=1e-3, atol=1e-3)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@TRAINED
def test_a_row_keeps_its_bits_in_any_place_though_threads_share_it(arch, three_threads):
    denoise, (x, *_) = ConditionedDenoiser(archs.network(arch, img_resolution=28), rows=8), batch(8, (2, 28, 28))
    with torch.no_grad():
        expected = denoise(x, torch.tensor(1.0))
        for shift in range(1, 8):
            assert torch.equal(denoise(x.roll(shift, 0), torch.tensor(1.0)), expected.roll(shift, 0)), shift


# In training

FULL = ['--cond=1', '--label-dropout=0.3', '--cep=gaussian', '--augment=0.5', '--workers=0']
CONSISTENCY = ['--consistency=euler:steps=2,batch_size=4']
RUNS = {
    'edm': CONSISTENCY,
    'vp': ['--precond=vp', '--precision=bf16', *CONSISTENCY],
    've': ['--precond=ve', '--batch-gpu=8', '--checkpointing=1'],
    'iddpm': ['--precond=iddpm'],
    'hybrid': ['--precond=iddpm', '--objective=hybrid', '--prediction=v', '--diffusion=linear:steps=100'],
    'simple': ['--precond=iddpm', '--objective=simple', '--prediction=edm'],
    'vlb': ['--precond=iddpm', '--objective=vlb', '--prediction=eps', '--timesteps=second_moment'],
}
PIECES = [*zip(WEIGHTS, itertools.cycle(PENALTIES), itertools.cycle(NOISE), itertools.cycle(PAIRINGS))]


def steps(run, count):
    for _ in range(count):
        run.step()
    run.data.feed.close()
    return run


@TRAINED
@pytest.mark.parametrize('name', RUNS)
def test_every_preconditioning_and_objective(tmp_path, arch, name):
    """Five steps move every parameter, also those that the zeros of fresh networks shield at first; the tick is logged."""
    run = tiny.make_run(tmp_path, f'--arch={TINY[arch]}', *FULL, *RUNS[name])
    before = [p.detach().clone() for p in run.params]
    run = steps(run, 5)
    run.report()
    (line,) = tiny.read_log(tmp_path)
    losses = {key: value for key, value in line.items() if key.startswith('Loss/')}
    assert line['Grad/skipped'] == 0 and line['Grad/norm'] > 0 and losses
    assert ('Loss/consistency' in losses) == (CONSISTENCY[0] in RUNS[name])
    assert all(p.isfinite().all() for p in run.params)
    still = [key for (key, p), old in zip(run.net.named_parameters(), before) if torch.equal(p, old)]
    assert not still


@TRAINED
def test_every_weight_penalty_noise_and_pairing(tmp_path, arch):
    for weight, penalty, noise, pairing in PIECES:
        flags = [f'--weight={weight}', f'--penalty={penalty}', f'--noise={noise}', f'--pairing={pairing}']
        run = steps(tiny.make_run(tmp_path, f'--arch={TINY[arch]}', '--workers=0', *flags), 2)
        assert all(p.isfinite().all() for p in run.params), flags


@TRAINED
def test_restored_run_equals_the_saved_one(tmp_path, arch):
    """Network, optimizer and average go on alike from the other's file, bit for bit."""
    flags = [f'--arch={TINY[arch]}', *FULL, '--power-ema=0.1', *CONSISTENCY]
    first = tiny.make_run(tmp_path, *flags)
    for _ in range(3):
        first.step()
    first.save_state()
    first.finish_states()
    second = tiny.make_run(tmp_path, *flags)
    second.restore(checkpoint.load(checkpoint.states(tmp_path)[0]), 'file')
    for run in (first, second):
        steps(run, 3)
    for part in ('net', 'optimizer', 'objective', 'ema'):
        assert tiny.digest(getattr(first, part).state_dict()) == tiny.digest(getattr(second, part).state_dict())


@TRAINED
def test_trained_saved_loaded_and_sampled(tmp_path, arch):
    """Snapshot and state give the pixels of the average in memory."""
    run = steps(tiny.make_run(tmp_path, f'--arch={TINY[arch]}', *FULL), 5)
    net = copy.deepcopy(run.ema.module).eval()
    save_network(net, str(tmp_path / 'snapshot'))
    run.save_state()
    run.finish_states()
    pixels = lambda net: torch.cat([part.images for part in generate_images(net, range(3), num_steps=2)])
    expected = pixels(net)
    assert expected.isfinite().all() and expected.std() > 0
    for ref in (tmp_path / 'snapshot', checkpoint.states(tmp_path)[0]):
        assert torch.equal(pixels(load_network(ref)), expected)


@TRAINED
def test_export_to_diffusers_says_why_not(arch):
    net = archs.network(arch)
    assert difference(net).endswith(f'this network is a {type(net.model).__name__}')


@TRAINED
def test_refused_by_name(tmp_path, arch):
    with pytest.raises(UserError, match='"nonsense"') as err:
        tiny.call(f'--outdir={tmp_path / "runs"}', f'--data={tiny.make_zip(tmp_path / "data.zip")}', f'--arch={TINY[arch]},nonsense=1')
    assert '\n' not in err.value.message and not (tmp_path / 'runs').exists()
