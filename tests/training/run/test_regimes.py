# SPDX-License-Identifier: Apache-2.0
"""--regime: which one fits the data, what it changes, and what is said at the end of a run."""

import dataclasses
import shlex

import numpy as np
import pytest

from dnnlib import UserError
from tests.support import ROOT, tiny
from training.data.dataset import Levels
from training.run import regimes
from training.run.config import from_json, to_json
from training.run.states import changes
from training.run.summary import closing_lines
from training.sampling import pieces


def test_levels_are_counted():
    assert Levels.of(np.array([0.0, 0.2, 0.0, 0.4])) == (4, 2, 0.2, 0.4)
    assert Levels.of(np.zeros(3)) == (3, 3, 0.0, 0.0)


@pytest.mark.parametrize(('share', 'name', 'words'), [
    (0, 'all-clean', 'all 64 images are clean'), (0.9, 'few-clean', '6 of 64 images are clean, the others have sigma_n 0.4'),
    (1, 'noisy-only', 'none of 64 images is clean, they have sigma_n 0.4; snapshots are sampled down to sigma 0.4')])
def test_the_one_that_fits_is_found(tmp_path, capsys, share, name, words):
    flags = [f'--corruption-probability={share}']
    config = tiny.options(tmp_path, '--regime=auto', *flags)
    assert config.run.regime == name and f'Regime {name}: {words}' in capsys.readouterr().out
    assert tiny.options(tmp_path, f'--regime={name}', *flags) == dataclasses.replace(config, run=dataclasses.replace(
        config.run, command={**config.run.command, 'regime': name}))
    plain = tiny.options(tmp_path, *flags)
    assert plain.run.regime is None and not changes(plain, config)  # a run can be continued with or without it
    for other in regimes.REGIMES.keys() - {name, 'auto'}:
        with pytest.raises(UserError, match=rf'--regime={other} is for .*; use --regime={name}'):
            tiny.options(tmp_path, f'--regime={other}', *flags)


def test_snapshots_of_noisy_images_alone_are_sampled_down_to_their_level(tmp_path):
    """Also where the network's sampler is another one; nothing else of the configuration changes."""
    flags = ['--corruption-probability=1', '--sigma=0.25']
    found = tiny.options(tmp_path, '--regime=noisy-only', *flags).network.arguments
    assert found.pop('sampling') == {'sampler': 'heun:stop_sigma=0.25', 'steps': 18}
    assert found == tiny.options(tmp_path, *flags).network.arguments
    discrete = [*flags, '--precond=iddpm', '--objective=simple', '--prediction=eps', '--augment=0']
    assert tiny.options(tmp_path, '--regime=auto', *discrete).network.arguments['sampling'] == {
        'sampler': 'ancestral:stop_sigma=0.25', 'steps': 50}
    net = tiny.make_run(tmp_path, '--regime=auto', *flags).net
    assert pieces.default_pieces(net)['stepper'].keywords['stop_sigma'] == 0.25
    for own in ({'stop_sigma': 0.0}, {'stop_variance': 0.0}):  # an option wins over the network's own key
        assert pieces.sampler_pieces(net, **own)['stepper'].keywords['stop_sigma'] == 0
        assert pieces.choose(net, stop_sigma=0.0)[0] == 'heun' and pieces.choose(net)[0] == 'heun:stop_sigma=0.25'


@pytest.mark.parametrize(('share', 'truncated'), [(0.95, False), (0.98, True)])
def test_so_are_those_of_very_few_clean_images(tmp_path, share, truncated):
    config = tiny.options(tmp_path, '--regime=few-clean', f'--corruption-probability={share}')  # 3 of 64 are clean, and 1
    assert ('sampling' in config.network.arguments) == truncated


def test_a_run_ends_with_commands_to_go_on(tmp_path):
    config = tiny.options(tmp_path, '--regime=auto', '--corruption-probability=1', '--corruption-seed=3')
    (tmp_path / 'network-snapshot-000001').mkdir()
    lines = closing_lines(tmp_path, '1s', config)
    network = next(line for line in lines if line.startswith('Last snapshot')).split()[-1]
    commands = [shlex.split(line) for line in lines if line.startswith('  python')]
    distill, refine = commands[1:]
    assert {'--sigma=0.4', '--corruption-probability=1', '--corruption-seed=3', f'--data={tmp_path}/data.zip',
            f'--distill=rsd:teacher={network}'} <= set(distill) and f'--network={network}' in refine
    assert closing_lines(tmp_path, '1s', tiny.options(tmp_path, '--corruption-probability=1')) == closing_lines(tmp_path, '1s')


def test_the_named_pages_and_scripts_exist():
    for regime in regimes.REGIMES.values():
        for purpose, command in regime.after:
            assert (ROOT / purpose.rpartition('(')[2].rstrip(')')).is_file() and (ROOT / command.split()[1]).is_file()


def test_configurations_of_older_runs_have_none(tmp_path):
    values = to_json(tiny.options(tmp_path))
    del values['run']['regime']
    assert from_json(values).run.regime is None


def test_a_distillation_has_no_regime(tmp_path):
    with pytest.raises(UserError, match='--regime=auto cannot be combined with --distill'):
        tiny.options(tmp_path, '--regime=auto', '--distill=rsd:teacher=nowhere')
