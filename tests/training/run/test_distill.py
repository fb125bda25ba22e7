# SPDX-License-Identifier: Apache-2.0
"""train.py --distill: turns, exact resume, ranks, snapshots that are sampled in one evaluation, and what it refuses."""

import importlib
import json
import shutil

import pytest
import torch
from click.testing import CliRunner

import generate
from dnnlib import UserError
from dnnlib.files import read_json
from tests.support import tiny
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.sampling import pieces
from training.sampling.generate import SeededDraws, generate_images

NOISY = ['--corruption-probability=1', '--threads=1']
SHORT = [*NOISY, '--tick=0.08', '--snap=1', '--dump-minutes=0']


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """(data, snapshot of a denoiser after 12 steps)."""
    folder = tmp_path_factory.mktemp('teacher')
    run = tiny.make_run(folder, *NOISY, '--dropout=0.3')
    for _ in range(12):
        run.step()
    run.data.feed.close()
    save_network(run.net, folder / 'net')
    return folder / 'data.zip', folder / 'net'


def other_teacher(folder, teacher, change=lambda config: None, factor=1.0):
    """A copy of the teacher with another config.json, or other weights."""
    shutil.copytree(teacher, folder)
    net = load_network(teacher)
    with torch.no_grad():
        for p in net.parameters():
            p *= factor
    save_network(net, folder)
    config = read_json(folder / 'config.json')
    change(config)
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def flags(teacher, *more, keys=''):
    data, net = teacher
    return [f'--data={data}', *tiny.REST, *SHORT, '--seed=5', f'--distill=rsd:teacher={net}{keys}', *more]


def make_run(folder, teacher, *more, keys=''):
    shutil.copy(teacher[0], folder / 'data.zip')
    return tiny.make_run(folder, *NOISY, f'--distill=rsd:teacher={teacher[1]}{keys}', '--dropout=0.3', *more)


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_only_one_network_moves_in_a_step(tmp_path, teacher):
    """Adam's momentum does not move the other, whose gradients are 0; all of them begin as the teacher."""
    run = make_run(tmp_path, teacher, keys=',fake_steps=2')
    net, fake, (guide,) = run.net, run.objective.fake, run.objective.teacher
    first = weights(load_network(teacher[1]))
    assert equal(first, weights(net)) and equal(first, weights(fake)) and equal(first, weights(guide))
    run.step()  # with a learning rate of 0
    for step in range(1, 9):
        before = weights(net), weights(fake), weights(run.ema.module)
        run.step()
        fakes = step % 3 < 2
        assert equal(before[0], weights(net)) == fakes and equal(before[1], weights(fake)) != fakes
        assert equal(first, weights(guide))
    assert not any(p.requires_grad for p in guide.parameters()) and not equal(before[2], weights(run.ema.module))
    run.data.feed.close()


def test_generator_and_psi_have_no_dropout(tmp_path, teacher):
    run = make_run(tmp_path, teacher)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for net in (run.net, run.objective.fake):
        assert net.training and torch.equal(net(x, torch.tensor(1.0)), net(x, torch.tensor(1.0)))
    run.data.feed.close()


def test_accumulation(tmp_path, teacher):
    """The gradients of four micro-batches of 4 are those of the batch of 16, up to rounding, in both turns."""
    found = {size: [] for size in (16, 4)}
    for size, gradients in found.items():
        (tmp_path / f'{size}').mkdir()
        run = make_run(tmp_path / f'{size}', teacher, f'--batch-gpu={size}', '--lr=1e-9')
        with torch.no_grad():
            for p in run.objective.fake.parameters():
                p *= 1.02
        for net in (run.objective.fake, run.net):
            run.step()
            gradients += [p.grad.clone() for p in net.parameters()]
        run.data.feed.close()
    assert sum(float(gradient.abs().sum()) > 0 for gradient in found[16]) > len(found[16]) * 0.9
    for one, other in zip(*found.values()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-7)


def test_continued_equals_straight(tmp_path, teacher):
    """11 steps, and 9 more by another command: every tensor of the state is that of 20 steps, bit for bit."""
    straight, cut, moved = tmp_path / 'straight', tmp_path / 'cut', tmp_path / 'moved'
    keys = dict(keys=',fake_lr=2')
    tiny.call(f'--outdir={straight}', *flags(teacher, '--dump=4', '--snap=0', '--duration=0.00032', **keys))
    tiny.call(f'--outdir={cut}', *flags(teacher, '--dump=4', '--snap=0', '--duration=0.000176', **keys))
    shutil.copytree(teacher[1], moved)  # the same weights elsewhere
    tiny.call(f'--outdir={cut}', *flags((teacher[0], moved), '--dump=1', '--snap=0', '--duration=0.00032', '--resume=latest', **keys))
    mine, theirs = (tiny.read_state(tiny.only_folder(each) / tiny.STEP_20) for each in (cut, straight))
    assert mine['progress']['step'] == 20 and set(mine['objective']) == {f'fake.{name}' for name in mine['net']}
    assert all(tiny.digest(mine[part]) == tiny.digest(theirs[part]) for part in ('net', 'ema', 'optimizer', 'objective'))
    assert mine['options']['network']['teacher'] == str(moved)
    assert all(line['Loss/fake'] > 0 and 'Loss/generator' in line for line in tiny.read_log(tiny.only_folder(straight)))


def test_another_teacher_does_not_continue(tmp_path, teacher):
    tiny.call(f'--outdir={tmp_path / "runs"}', *flags(teacher, '--dump=1', '--duration=0.00008'))
    other = other_teacher(tmp_path / 'other', teacher[1], factor=1.01)
    with pytest.raises(UserError, match=r"--distill: the weights of teacher=.*other are not those of the run's teacher"):
        tiny.call(f'--outdir={tmp_path / "runs"}', *flags((teacher[0], other), '--duration=0.00016', '--resume=latest'))
    with pytest.raises(UserError, match='objective.distill: rsd -> rsd:alpha=1.0'):
        tiny.call(f'--outdir={tmp_path / "runs"}', *flags(teacher, '--duration=0.00016', '--resume=latest', keys=',alpha=1.0'))


def test_two_ranks_train_as_one(tmp_path, teacher):
    found = []
    for ranks in (1, 2):
        args = [f'--outdir={tmp_path / str(ranks)}', *flags(teacher, '--duration=0.00008', '--dump=1', '--snap=0', '--lr=1e-5')]
        tiny.finish(args, tmp_path / f'log{ranks}', ranks)
        folder = tiny.only_folder(tmp_path / str(ranks))
        found.append((tiny.read_log(folder), tiny.read_state(folder / 'training-state-000000.080.pt')))
    (logs, one), (other_logs, other) = found
    for name in ('Loss/fake', 'Loss/generator', 'Grad/norm'):
        assert [line[name] for line in logs] == pytest.approx([line[name] for line in other_logs], rel=1e-4, abs=1e-5)
    for part in ('net', 'objective'):
        apart = [(value - other[part][name]).abs() for name, value in one[part].items()]
        moved = sum(float(value.sum()) for value in apart) / sum(value.numel() for value in apart)
        assert moved < 1e-7  # Adam's steps are 1e-5


# --- snapshots


@pytest.fixture(scope='module')
def snapshot(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp('runs')
    tiny.call(f'--outdir={folder}', *flags(teacher, '--duration=0.00008', '--samples=4', keys=',level=1.5'))
    return tiny.only_folder(folder) / 'network-snapshot-000000.080'


def test_snapshot_is_sampled_in_one_evaluation(tmp_path, snapshot, monkeypatch):
    net = load_network(snapshot)
    assert net.config['sampling'] == {'sampler': 'euler', 'levels': 'explicit:sigmas=1.5', 'steps': 1}
    calls = []
    part = next(generate_images(net, range(5), report=calls.append, **pieces.default_pieces(net)))
    assert calls == [5]
    z = SeededDraws(range(5)).randn([1, 8, 8])
    torch.testing.assert_close(part.images, net(1.5 * z, torch.tensor(1.5)).double(), rtol=0, atol=1e-5)

    forward, levels = type(net).forward, []
    seen = lambda self, x, sigma, *rest: levels.append(sigma.flatten()) or forward(self, x, sigma, *rest)
    monkeypatch.setattr(type(net), 'forward', seen)
    result = CliRunner().invoke(generate.main, [f'--network={snapshot}', f'--outdir={tmp_path / "out"}', '--seeds=0-7'])
    assert result.exit_code == 0, result.output
    assert torch.cat(levels).tolist() == [1.5]  # one call for these eight seeds
    assert len(list((tmp_path / 'out').rglob('*.png'))) == 8
    refused = CliRunner().invoke(generate.main, [f'--network={snapshot}', f'--outdir={tmp_path / "more"}', '--seeds=0', '--steps=18'])
    assert refused.exit_code == 1 and '18' in refused.output


def test_card_says_what_it_is_and_names_no_path(snapshot, teacher):
    card = (snapshot / 'README.md').read_text()
    assert 'G(z) = D(1.5 z; 1.5)' in card and str(teacher[1]) not in card and '"distill": "rsd:level=1.5"' in card


def test_generator_starts_another_run_but_is_no_teacher(tmp_path, teacher, snapshot, capsys):
    tiny.call(f'--outdir={tmp_path}', *flags(teacher, f'--transfer={snapshot}', '--duration=0.000016'))
    assert 'Transferred' in capsys.readouterr().out
    with pytest.raises(UserError, match='is a generator of one step itself; give the denoiser'):
        tiny.call(f'--outdir={tmp_path}', *flags((teacher[0], snapshot)))


@pytest.mark.parametrize('script', ['denoise', 'eval_nll'])
def test_generator_is_no_denoiser(tmp_path, teacher, snapshot, script):
    """It knows one level only, so that scripts that need a denoiser of every level refuse it."""
    out = {'denoise': [f'--dest={tmp_path / "out.zip"}', '--sigma=0.4'], 'eval_nll': [f'--out-path={tmp_path / "out.json"}']}[script]
    main = importlib.import_module(script).main
    done = CliRunner().invoke(main, [f'--network={snapshot}', f'--data={teacher[0]}', *out])
    assert done.exit_code == 1 and 'is a generator of one step itself; give the denoiser' in done.output
    assert not list(tmp_path.iterdir())


def test_conditional(tmp_path):
    """Labels of the data go to all three networks."""
    run = tiny.make_run(tmp_path, *NOISY, '--cond=1', '--label-dropout=0.2')
    run.step()
    run.data.feed.close()
    save_network(run.net, tmp_path / 'net')
    seen = []
    distilled = tiny.make_run(tmp_path, *NOISY, '--cond=1', f'--distill=dmd:teacher={tmp_path / "net"}')
    for net in (distilled.net, distilled.objective.fake, *distilled.objective.teacher):
        net.register_forward_hook(lambda _, args, kwargs, out, net=net: seen.append((net, kwargs['class_labels'])), with_kwargs=True)
    for _ in range(2):
        distilled.step()
    assert len(seen) == 5 and all(labels.shape == (16, 3) and labels.sum() == 16 for _, labels in seen)
    distilled.data.feed.close()


# --- what is refused


@pytest.mark.parametrize('more, text', [
    (['--precond=vp'], '--precond=vp: teacher='), (['--sigma-data=0.7'], '--sigma-data=0.7: teacher='),
    (['--arch=ncsnpp'], '--arch=ncsnpp: the network is that of teacher='), (['--cbase=32'], 'leave --arch and its keys out'),
    (['--cond=1'], 'has 0 classes, and this run 3; leave --cond out'), (['--objective=simple'], '--objective=simple cannot be combined'),
    (['--val=0.1'], '--val=0.1 cannot be combined with --distill'), (['--gns=1', '--batch-gpu=4'], '--gns=True cannot be'),
    (['--consistency=bridge'], '--consistency=bridge cannot be'), (['--term=denoise'], '--term=denoise cannot be'),
    (['--augment=0.1'], '--augment=0.1 cannot be'), (['--cep=gaussian', '--cond=1'], '--cep=gaussian cannot be')])
def test_options_that_do_not_go_with_it(tmp_path, teacher, more, text):
    with pytest.raises(UserError) as err:
        tiny.call(f'--outdir={tmp_path / "runs"}', *flags(teacher, *more))
    assert text in err.value.message and '\n' not in err.value.message
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('spec, text', [
    ('rsd', '--distill=rsd needs a teacher: rsd:teacher=REF'), ('rsd:teacher=nowhere', '--distill: teacher=nowhere: no such file'),
    ('rsd:alpha=x', '"alpha" must be a number'), ('sid:teacher=x', 'choose from dmd, rsd'), ('dmd:alpha=1', '"dmd" has no key "alpha"'),
    ('rsd:teacher={net},alpha=-1', 'alpha=-1 must be 0 or more'), ('rsd:teacher={net},fake_steps=0', 'fake_steps=0 must be 1'),
    ('rsd:teacher={data}', '--distill: teacher=')])
def test_bad_specs(tmp_path, teacher, spec, text):
    data, net = teacher
    spec = spec.replace('{net}', str(net)).replace('{data}', str(data))
    with pytest.raises(UserError) as err:
        tiny.call(f'--outdir={tmp_path / "runs"}', f'--data={data}', *tiny.REST, f'--distill={spec}')
    assert text in err.value.message and '\n' not in err.value.message
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('change, text', [
    (dict(units={'offset': 0.0, 'scale': 2.0}), 'has the units'),
    (dict(autoencoder={'ref': 'a/b', 'range': '0..1', 'sha256': 'a' * 64}), 'makes latents of another autoencoder')])
def test_teachers_of_other_data(tmp_path, teacher, change, text):
    try:
        net = other_teacher(tmp_path / 'other', teacher[1], lambda config: config.update(change))
        load_network(net)
    except UserError as err:
        pytest.fail(f'the test needs another change: {err.message}')
    with pytest.raises(UserError, match=text):
        tiny.call(f'--outdir={tmp_path / "runs"}', *flags((teacher[0], net)))


def test_conditional_teacher_needs_labels(tmp_path, teacher):
    run = tiny.make_run(tmp_path, '--cond=1')
    run.data.feed.close()
    save_network(run.net, tmp_path / 'net')
    with pytest.raises(UserError, match='has 3 classes, and this run 0; add --cond=1'):
        tiny.call(f'--outdir={tmp_path / "runs"}', *flags((teacher[0], tmp_path / 'net')))


def test_discrete_teacher_is_refused(tmp_path, teacher):
    run = tiny.make_run(tmp_path, '--precond=iddpm', '--objective=simple')
    run.data.feed.close()
    save_network(run.net, tmp_path / 'net')
    with pytest.raises(UserError, match='has discrete timesteps'):
        tiny.call(f'--outdir={tmp_path / "runs"}', *flags((teacher[0], tmp_path / 'net')))


@pytest.mark.parametrize('precond', ['vp', 've'])
def test_other_preconditioning_comes_from_the_teacher(tmp_path, teacher, precond):
    run = tiny.make_run(tmp_path, f'--precond={precond}', *NOISY, '--dropout=0.3')
    run.data.feed.close()
    save_network(run.net, tmp_path / 'net')
    found = make_run(tmp_path, (teacher[0], tmp_path / 'net'))
    assert found.config.network.arguments['precond'] == precond and found.config.objective.weight == 'snr'
    found.step(), found.step()
    found.data.feed.close()
    with pytest.raises(UserError, match='level=500 is outside the levels of the teacher'):
        make_run(tmp_path, (teacher[0], tmp_path / 'net'), keys=',level=500')


def test_dry_run_counts_both_networks(teacher, capsys, tmp_path):
    tiny.call(f'--outdir={tmp_path}', *flags(teacher, '-n'))
    assert '2.5 network evaluations per image and step' in capsys.readouterr().out
