# SPDX-License-Identifier: Apache-2.0
"""States, snapshots and options that version 0.1.0 wrote: loaded, sampled, and continued to the same numbers."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import generate
import train
from dnnlib import UserError
from tests.support import GOLDEN
from training.checkpoints.load import load_network
from training.checkpoints.posthoc import stored_averages
from training.networks.rows import RowDraws
from training.run import config, training_loop

WRITTEN = GOLDEN / 'version_0.1.0'
STATE, CONTINUED, SNAPSHOT = 'training-state-000000.064.pt', 'training-state-000000.128.pt', 'network-snapshot-000000.128'
COMMON = ['--data=data.zip', '--seed=5', '--batch=16', '--tick=0.064', '--dump=1', '--snap=1', '--samples=0', '--lr-rampup=0.0001',
          '--cbase=4', '--cres=1,1', '--blocks=1', '--attn=4', '--ema=0.001', '--nosubdir', '--resume=latest', '--duration=0.000128',
          '--threads=1']
COMMANDS = {
    'mix': ['--cond=1', '--sigma=0.4', '--corruption-probability=0.7', '--xflip=1', '--weight=learned', '--penalty=pseudo_huber',
            '--consistency=bridge:steps=2,batch_size=8', '--cep=gaussian', '--label-dropout=0.1', '--label-corruption=0.2',
            '--power-ema=0.05,0.10', '--val=0.1'],
    'hybrid': ['--precond=iddpm', '--objective=hybrid', '--diffusion=cosine:steps=20', '--timesteps=second_moment:history=2']}
close = lambda found, expected: torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # other processors round otherwise


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def continued(name, folder, monkeypatch):
    """(state, lines of stats.jsonl) after the last command of the golden's README, given again today."""
    monkeypatch.chdir(folder)
    shutil.copy(WRITTEN / 'data.zip', 'data.zip')
    (folder / name).mkdir()
    for file in (STATE, 'options.json'):
        shutil.copy(WRITTEN / name / file, folder / name / file)
    train.main([*COMMON, *COMMANDS[name], f'--outdir={name}'], standalone_mode=False)
    lines = [json.loads(line) for line in (folder / name / 'stats.jsonl').read_text().splitlines()]
    return torch.load(folder / name / CONTINUED, weights_only=True), lines


@pytest.mark.parametrize('name', COMMANDS)
def test_a_state_is_continued_to_the_same_numbers(name, tmp_path, monkeypatch):
    """With the masks of that version, which drew them from torch's own state, as a network still does that is not attached to a run."""
    monkeypatch.setattr(training_loop, 'attach_row_draws', lambda net: RowDraws())
    (state, lines), expected = continued(name, tmp_path, monkeypatch), load_file(WRITTEN / name / 'continued.safetensors')
    found = {f'net.{key}': value for key, value in state['net'].items()}
    found |= {f'ema.halflife.{key}': value for key, value in state['ema']['halflife'].items()}
    found |= {f'objective.{key}': value for key, value in state['objective'].items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        close(found[key], value)
    for line, before in zip(lines, json.loads((WRITTEN / 'continued.json').read_text())[name], strict=True):
        for key, value in before.items():
            assert line[key] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), key


def test_masks_are_others_now(tmp_path, monkeypatch):
    """By default the same pairs are seen at the same levels, and only what masks do to a network so young differs."""
    state, (line, held_out) = continued('mix', tmp_path, monkeypatch)
    before, held_out_before = json.loads((WRITTEN / 'continued.json').read_text())['mix']
    assert [line[key] for key in ('nimg', 'Pairs/passed', 'Pairs/accepted')] == [128, 221, before['Pairs/accepted']]
    expected = load_file(WRITTEN / 'mix' / 'continued.safetensors')
    assert not torch.equal(state['net']['model.map_label.weight'], expected['net.model.map_label.weight'])
    for key in ('Loss/denoise', 'Loss/denoise/noisy', 'Loss/log_weight'):
        assert line[key] == pytest.approx(before[key], rel=0.01) and line[key] != before[key]
    assert held_out['Val/noisy'] == pytest.approx(held_out_before['Val/noisy'], rel=0.01)


@pytest.mark.parametrize('name', COMMANDS)
def test_a_state_is_not_continued_with_other_options(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(WRITTEN / 'data.zip', 'data.zip')
    shutil.copy(WRITTEN / name / STATE, STATE)
    args = [arg for arg in COMMON if not arg.startswith(('--resume', '--nosubdir'))]
    result = CliRunner().invoke(train.main, [*args, *COMMANDS[name], '--outdir=runs', f'--resume={STATE}', '--batch=8'])
    assert result.exit_code == 1 and 'run.batch: 16 -> 8' in result.output and len(result.output.splitlines()) == 1


@pytest.mark.parametrize('name', COMMANDS)
def test_options_become_the_tree(name):
    found = config.from_json(json.loads((WRITTEN / name / 'options.json').read_text()))
    assert config.from_json(json.loads(json.dumps(config.to_json(found)))) == found
    assert found.objective.terms == {'mix': ['denoise', 'bridge:steps=2,batch_size=8'], 'hybrid': ['denoise', 'bound:coeff=0.001']}[name]
    with pytest.raises(UserError, match='unknown key "data.colour"'):
        config.from_json({**config.to_json(found), 'data': {'path': 'x', 'colour': 1}})


@pytest.mark.parametrize('file, folder, options', [
    ('samples-mix.npy', 'mix', ['--sampler=heun']), ('samples-hybrid.npy', 'hybrid', ['--sampler=heun', '--levels=edm']),
    ('samples-anc.npy', 'hybrid', ['--sampler=ancestral'])])
def test_a_snapshot_makes_the_same_images(file, folder, options, tmp_path):
    args = [f'--network={WRITTEN / folder / SNAPSHOT}', f'--outdir={tmp_path}', '--seeds=0-3', '--steps=4', '--format=npy', '--threads=1']
    result = CliRunner().invoke(generate.main, [*args, *options])
    assert result.exit_code == 0, result.output
    expected = np.load(WRITTEN / file)
    found = np.stack([np.load(tmp_path / f'{seed:06d}.npy') for seed in range(4)])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('weights', ['ema', 'raw', 'ema:0.05'])
def test_a_state_is_a_network(weights):
    net, x = load_network(WRITTEN / 'mix' / STATE, weights=weights), torch.ones(1, 1, 8, 8)
    assert net(x, 1.0).isfinite().all()
    found = net.state_dict()
    held = torch.load(WRITTEN / 'mix' / STATE, weights_only=True)
    kept = held['net'] if weights == 'raw' else held['ema']['halflife' if weights == 'ema' else 'power_0.050']
    assert all(torch.equal(found[key], value) for key, value in kept.items())


def test_a_stored_average_is_found():
    ((path, nimg, sigma_rel),) = stored_averages(WRITTEN / 'mix')
    assert path.endswith('ema-snapshot-000000.128-0.050.safetensors') and (nimg, sigma_rel) == (128, 0.05)
