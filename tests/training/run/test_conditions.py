# SPDX-License-Identifier: Apache-2.0
"""Label corruption, condition-embedding perturbation and label dropout, through the options and the objects of a run."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import train
from tests.support import tiny
from torch_utils import misc
from training.checkpoints.load import load_network

COND = ['--cond=1', '--xflip=1', '--augment=0', '--dropout=0']


def labels_seen(run, batches=24):
    """{raw_idx: class} of what the feed gives; an image that came with two classes fails."""
    seen = {}
    for _ in range(batches):
        batch = run.data.feed.next()
        assert batch.class_labels.min() >= 0 and batch.class_labels.max() < run.net.label_dim
        for raw_idx, label in zip(batch.raw_idx.tolist(), batch.class_labels.tolist()):
            assert seen.setdefault(raw_idx, label) == label, 'an image has one label, in every epoch and in its mirror image'
    run.data.feed.close()
    return seen


def refused(folder, *flags):
    data = tiny.make_zip(folder / 'data.zip')
    result = CliRunner().invoke(train.main, [f'--outdir={folder / "run"}', f'--data={data}', *tiny.FLAGS, '--duration=0.000016', *flags])
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    errors = [line for line in result.output.splitlines() if line.startswith('Error: ')]
    assert len(errors) == 1 and result.output.rstrip().endswith(errors[0]), result.output
    assert not list((folder / 'run').rglob('*'))
    return errors[0]


# --- label corruption

@pytest.mark.parametrize('rate, flags', [(0.25, []), (0.25, ['--val=0.25']), (1.0, ['--sigma=0']), (0.37, ['--val=0.1', '--workers=0'])])
def test_exact_count_of_wrong_labels(tmp_path, capsys, rate, flags):
    """round(rate x training images) images carry another class; held-out images carry their own."""
    run = tiny.make_run(tmp_path, *COND, f'--label-corruption={rate}', *flags)
    held_out = {}
    if run.data.validation is not None:
        check = run.data.validation
        rows = check.labels[check.items].tolist()
        images = [item % 64 for item in check.items.tolist()]
        held_out = dict(zip(images, rows))
        assert len(held_out) == round(float(flags[0].split('=')[1]) * 64)
        assert all(label == image % 3 for image, label in held_out.items())
    count = 64 - len(held_out)
    seen = labels_seen(run, batches=60)
    assert len(seen) == count and not set(seen) & set(held_out)
    wrong = [image for image, label in seen.items() if label != image % 3]
    assert len(wrong) == round(rate * count)
    assert f'{len(wrong)} of {count} images carry a wrong label' in capsys.readouterr().out


def test_choice_is_fixed_by_its_seed(tmp_path):
    def seen(*flags):
        return labels_seen(tiny.make_run(tmp_path, *COND, '--label-corruption=0.5', '--sigma=0', *flags))

    first = seen()
    assert first == seen('--seed=99') == seen('--batch=8') and first != seen('--corruption-seed=1')


def test_groups(tmp_path):
    """Classes 0 and 2 are confused with each other only; class 1 keeps its label."""
    run = tiny.make_run(tmp_path, *COND, '--label-corruption=0.6', '--label-corruption-groups=0,2', '--sigma=0')
    seen = labels_seen(run)
    wrong = {image: label for image, label in seen.items() if label != image % 3}
    assert len(seen) == 64 and len(wrong) == round(0.6 * 64) and all({image % 3, label} == {0, 2} for image, label in wrong.items())


@pytest.mark.parametrize('flags, words', [
    (['--label-corruption=0.1'], ['--label-corruption=0.1', '--cond=1']),
    (['--label-corruption-groups=0,1', '--cond=1'], ['--label-corruption-groups', '--label-corruption=RATE']),
    (['--label-corruption=1.5', '--cond=1'], ['--label-corruption']),
    (['--label-corruption=nan', '--cond=1'], ['--label-corruption', 'nan']),
    (['--label-corruption=0.1', '--cond=1', '--label-corruption-groups=0,7'], ['--label-corruption-groups=[[0, 7]]', '0 to 2']),
    (['--label-corruption=0.1', '--cond=1', '--label-corruption-groups=0,1/1,2'], ['in at most one group']),
    (['--label-corruption=0.1', '--cond=1', '--label-corruption-groups=a'], ['--label-corruption-groups', '"a"']),
    (['--label-corruption=0.9', '--cond=1', '--label-corruption-groups=0,1'], ['--label-corruption=0.9', 'lower it']),
    (['--cep=uniform'], ['--cep=uniform', '--cond=1']),
    (['--cep=normal', '--cond=1'], ['--cep=normal', 'gaussian, uniform']),
    (['--cep=gaussian:gamma=-1', '--cond=1'], ['--cep=gaussian:gamma=-1', '0 or more']),
    (['--label-dropout=0.1'], ['--label-dropout=0.1', '--cond=1']),
    (['--label-dropout=2', '--cond=1'], ['--label-dropout'])])
def test_refusals(tmp_path, flags, words):
    line = refused(tmp_path, *flags)
    assert all(word in line for word in words), line


# --- condition-embedding perturbation

@pytest.mark.parametrize('spec, power', [('uniform:gamma=0.5', 1 / 12), ('gaussian:gamma=0.5', 1 / 4)])
def test_perturbation_of_a_run(tmp_path, spec, power):
    """In training mode alone, of variance gamma^2 / 3d or gamma^2 / d (100 x 64 rows: 4 % is above 5 std); not in what is stored."""
    plain, run = tiny.make_run(tmp_path, *COND), tiny.make_run(tmp_path, *COND, f'--cep={spec}')
    layer, labels = run.net.model.map_label, torch.eye(3).repeat(2000, 1)
    clean = plain.net.model.map_label(labels)
    with misc.seeded('test'):
        change = (layer(labels) - clean).detach()
    assert float(change.square().sum(1).mean()) == pytest.approx(power, rel=0.04) and float(change.mean()) == pytest.approx(0, abs=0.01)
    assert len(change.unique(dim=0)) == len(change)
    assert torch.equal(layer.eval()(labels), clean) and torch.equal(run.ema.module.model.map_label(labels), clean)
    assert run.net.config == plain.net.config and list(run.net.state_dict()) == list(plain.net.state_dict())
    layer.train()
    for each in (plain, run):
        each.step()
    grads = [torch.cat([p.grad.flatten() for p in each.params]) for each in (plain, run)]
    assert grads[1].isfinite().all() and not torch.equal(*grads)


def test_gamma_0_is_no_perturbation(tmp_path):
    runs = [tiny.make_run(tmp_path, *COND, *flags) for flags in ([], ['--cep=uniform:gamma=0'], ['--cep=gaussian:gamma=0'])]
    for run in runs:
        for _ in range(2):
            run.step()
    assert len({tiny.digest(run.net.state_dict()) for run in runs}) == 1


def test_conditions_in_what_is_written(tmp_path):
    """options.json has them all; config.json has label_dropout alone, which a published network also has; the state resumes."""
    data = tiny.make_zip(tmp_path / 'data.zip')
    flags = [f'--outdir={tmp_path / "run"}', f'--data={data}', *tiny.FLAGS, *COND, '--cep=gaussian', '--label-dropout=0.2', '--nosubdir',
             '--label-corruption=0.5', '--seed=5', '--snap=1', '--dump=1']
    tiny.call(*flags, '--duration=0.00008')
    options = json.loads((tmp_path / 'run' / 'options.json').read_text())
    assert options['network']['cep'] == 'gaussian' and options['corruption']['labels'] == dict(rate=0.5, seed=0, groups=None)
    config = json.loads((tmp_path / 'run' / 'network-snapshot-000000.080' / 'config.json').read_text())
    assert config['label_dropout'] == 0.2 and config == options['network']['arguments'] and not [key for key in config if 'cep' in key]
    tiny.call(*flags, '--duration=0.00016', '--resume=latest')
    straight = tmp_path / 'straight'
    tiny.call(*flags, '--duration=0.00016', f'--outdir={straight}')
    states = [tiny.read_state(folder / 'training-state-000000.160.pt') for folder in (tmp_path / 'run', straight)]
    assert tiny.digest(states[0]['net']) == tiny.digest(states[1]['net'])
    net = load_network(straight / 'network-snapshot-000000.160')
    assert net.model.map_label.perturb is None


# --- label dropout

def test_label_dropout_of_a_run(tmp_path):
    """A dropped label teaches its weights nothing: at 1 they have no gradient, at 0.5 another one than at 0; sampling keeps labels."""
    grads = {}
    for share in (0, 0.5, 1):
        run = tiny.make_run(tmp_path, *COND, f'--label-dropout={share}')
        for parameter in run.net.model.parameters():  # some output layers start at 0, which would hide the labels
            parameter.data += 0.05
        run.step()
        grads[share] = run.net.model.map_label.weight.grad.clone()
        labels = torch.eye(3)
        x, sigma = torch.randn([3, 1, 8, 8], generator=misc.generator('x')), torch.ones(3)
        net = run.ema.module
        assert net.config.get('label_dropout', 0) == share
        net.model.load_state_dict(run.net.model.state_dict())
        assert not torch.equal(net(x, sigma, labels), net(x, sigma, torch.zeros_like(labels)))
    assert np.all([grads[0].abs().max() > 0, grads[1].abs().max() == 0]) and not torch.equal(grads[0.5], grads[0])
