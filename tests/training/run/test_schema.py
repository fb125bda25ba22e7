# SPDX-License-Identifier: Apache-2.0
"""What a run takes over of a training state: all of a sound one, and nothing of one that is wrong in any part."""

import copy

import pytest
import torch

from dnnlib import UserError
from tests.support import tiny
from torch_utils import tensor_file
from training.run import schema
from training.run.config import OptimizerConfig


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """(a run after two steps, the state that it saved)."""
    folder = tmp_path_factory.mktemp('run')
    run = tiny.make_run(folder, '--cbase=4', '--power-ema=0.05', '--weight=learned')
    for _ in range(2):
        run.step()
    run.save_state()
    run.finish_states()
    (path,) = folder.glob('training-state-*.pt')
    return run, tensor_file.read(path)


def refused(found, change):
    """The one line that a changed state is refused with, the run being untouched."""
    run, state = found
    state = copy.deepcopy(state)
    before = tiny.digest([run.net.state_dict(), run.ema.state_dict(), run.optimizer.state_dict(), dict(run.progress)])
    change(state)
    with pytest.raises(UserError, match='^here.pt: cannot resume from this state: .*; is it damaged?') as error:
        schema.checked(state, run, 'here.pt')
    assert tiny.digest([run.net.state_dict(), run.ema.state_dict(), run.optimizer.state_dict(), dict(run.progress)]) == before
    assert error.value.message.isprintable()
    return error.value.message


def put(*path, value):
    """A change: the value at a path."""
    def change(state):
        *way, last = path
        for key in way:
            state = state[key]
        state[last] = value
    return change


def drop(*path):
    def change(state):
        *way, last = path
        for key in way:
            state = state[key]
        del state[last]
    return change


def test_a_sound_state_is_taken_as_it_is(found):
    run, state = found
    taken = schema.checked(state, run, 'here.pt')
    assert tiny.digest({**taken, 'optimizer': None}) == tiny.digest({**state, 'optimizer': None})
    assert tiny.digest(taken['optimizer']['state']) == tiny.digest(state['optimizer']['state'])


def test_a_state_within_a_tick(found):
    """Where the tick began, what is left to do of it, and what was gathered in it so far."""
    run, state = found
    state = {**state, 'progress': {**state['progress'], 'tick_nimg': 16, 'pending': ['snapshot', 'state']},
             'stats': [{'sums': {'x': torch.zeros(3).double()}, 'tables': {'y': [['a', 'b'], torch.zeros(2, 3).double()]}}]}
    assert schema.checked(state, run, 'here.pt')['progress']['pending'] == ['snapshot', 'state']


def test_hyperparameters_are_the_runs_own(found):
    """Whatever the file says of them, or another version of PyTorch leaves out: they follow from the configuration."""
    run, state = found
    state = copy.deepcopy(state)
    state['optimizer']['param_groups'][0].pop('eps')
    state['optimizer']['param_groups'][0]['betas'] = 'none'
    (group,) = schema.checked(state, run, 'here.pt')['optimizer']['param_groups']
    assert group['eps'] == 1e-8 and tuple(group['betas']) == (0.9, 0.999)


def test_a_state_before_the_first_step_has_no_moments(found):
    run, state = found
    assert schema.checked({**state, 'optimizer': {**state['optimizer'], 'state': {}}}, run, 'here.pt')['optimizer']['state'] == {}


@pytest.mark.parametrize('name', ['nimg', 'step', 'tick', 'log_bytes', 'seconds'])
@pytest.mark.parametrize('value', [None, -1, 'x', float('nan'), float('inf'), True, [], 10 ** 30])
def test_counts(found, name, value):
    if name == 'seconds' and value == 10 ** 30:
        return
    assert f'"progress.{name}" must be' in refused(found, put('progress', name, value=value))


@pytest.mark.parametrize('change, words', [
    (put('progress', value=[]), '"progress" must be an object, got list'),
    (drop('progress', 'nimg'), '"progress.nimg" must be a whole number of 0 or more, got None'),
    (drop('progress', 'loss_scale'), '"progress.loss_scale" must be two numbers'),
    (put('progress', 'loss_scale', value=[0, 0]), 'contradicts itself'),
    (put('progress', 'loss_scale', value=[1, -1]), '"progress.loss_scale" must be a number of 0 or more, got -1'),
    (put('progress', 'stream', value=None), '"progress.stream" must be an object, got None'),
    (put('progress', 'stream', 'cursor', value=-5), '"progress.stream.cursor"'),
    (put('progress', 'stream', 'cursor', value=2 ** 60), '"progress.stream.cursor"'),
    (put('progress', 'stream', 'cursor', value=31), '32 pairs used of 31 drawn'),
    (put('progress', 'stream', 'used', value=16), 'contradicts itself: 32 images in 2 steps of 16, 16 pairs used'),
    (put('progress', 'step', value=3), 'contradicts itself'),
    (put('progress', 'tick_nimg', value=48), '"progress.tick_nimg" must not be above "progress.nimg", got 48'),
    (put('progress', 'tick_nimg', value='x'), '"progress.tick_nimg" must be a whole number'),
    (put('progress', 'pending', value=['state', 'exec']), '"progress.pending" must be a list of validate, snapshot, measure, state'),
    (put('stats', value={}), '"stats" must be a list'),
    (put('stats', value=[{'sums': {'x': torch.zeros(3)}, 'tables': {}}]), '"stats" must hold sums and tables'),
    (put('stats', value=[{'sums': {}, 'tables': {'x': [['a'], torch.zeros(2, 3).double()]}}]), '"stats" must hold sums and tables'),
    (put('net', value=3), '"net": expected a state dict'),
    (put('net', 'extra', value=torch.zeros(1)), '"net": the weights do not fit the config: extra is unknown'),
    (put('net', 'x\n\x1b[31m', value=torch.zeros(1)), r'x\n\x1b[31m is unknown'),
    (put('net', 'model.map_layer0.bias', value=torch.zeros(3)), 'model.map_layer0.bias is [3] in the weights'),
    (put('net', 'model.map_layer0.bias', value=torch.zeros(16).double()), 'model.map_layer0.bias is float64, and must be float32'),
    (put('net', 'model.map_layer0.bias', value=1.5), '"model.map_layer0.bias" holds float'),
    (put('ema', value=None), '"ema" must be an object'),
    (drop('ema', 'power_0.050'), '"ema" lacks the average "power_0.050"'),
    (drop('ema', 'halflife', 'model.map_layer0.bias'), '"ema.halflife": the weights do not fit'),
    (put('objective', value={}), '"objective": the weights do not fit the config: terms.denoise.weight.linear is missing'),
    (put('optimizer', value={}), '"optimizer.state" must be an object'),
    (put('optimizer', 'param_groups', value=5), '"optimizer.param_groups" must be a list of objects'),
    (put('optimizer', 'param_groups', 0, 'params', value=[1, 0]), 'are those of another network'),
    (drop('optimizer', 'param_groups', 0), 'are those of another network'),
    (put('optimizer', 'state', 10 ** 6, value={}), 'belongs to no parameter'),
    (put('optimizer', 'state', 'x', value={}), '"optimizer.state.x" belongs to no parameter'),
    (put('optimizer', 'state', 0, value=[]), '"optimizer.state.0" must be an object'),
    (drop('optimizer', 'state', 0, 'exp_avg'), '"optimizer.state.0.exp_avg" must be a tensor'),
    (put('optimizer', 'state', 0, 'exp_avg', value=torch.zeros(7)), '"optimizer.state.0.exp_avg" has the shape [7], and must have [4, 9]'),
    (put('optimizer', 'state', 0, 'exp_avg', value=torch.zeros(4).int()), 'floating-point numbers, got a tensor of int32'),
    (put('optimizer', 'state', 0, 'step', value=torch.tensor(float('nan'))), '"optimizer.state.0.step" must be a number of 0 or more'),
    (put('optimizer', 'state', 0, 'step', value=torch.zeros(2)), '"optimizer.state.0.step" has the shape [2], and must have []'),
])
def test_parts_that_are_wrong(found, change, words):
    assert words in refused(found, change)


def test_own_sampling_of_the_network_is_looked_at(found):
    """It comes with the state and is needed at the first grid of samples: hours later."""
    run, _ = found
    run.net.sampling = {'sampler': 'nonsense'}
    try:
        assert 'nonsense' in refused(found, lambda state: None)
    finally:
        run.net.sampling = None


def test_an_example_has_what_the_optimizer_remembers():
    for kind in ('adam', 'adamw:weight_decay=0.1'):
        example, param = schema.example(OptimizerConfig(kind=kind))
        assert {name: value.shape for name, value in example.items()} == {'step': (), 'exp_avg': param.shape, 'exp_avg_sq': param.shape}
