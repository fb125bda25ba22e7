# SPDX-License-Identifier: Apache-2.0
"""Checks of a training state before a run continues from it: whatever does not fit is refused by name, and the run is left unchanged."""

import math
from typing import Any

import torch

from dnnlib import UserError
from training.checkpoints.load import check_tensors, check_weights
from training.run.build import build_optimizer
from training.run.config import OptimizerConfig
from training.sampling.pieces import own_sampling

MOST = 2 ** 53  # upper limit of counts: what JSON and float64 hold exactly
PENDING = ('validate', 'snapshot', 'measure', 'state')  # what may still have to be done at the end of a tick


def checked(state: dict, run: Any, path: str) -> dict:
    """The content of a state file (checkpoint.load), checked for a Run with the same configuration; changes nothing.

    Its optimizer gets the hyperparameters of this run, which are those of its configuration, and the file's moments. Raises UserError,
    in one line that names `path`, for parts whose types, names or shapes differ from the run's, and for impossible counts."""
    try:
        check_progress(state['progress'], run.config.run.batch)
        check_module(run.net, state['net'], 'net')
        _check_dict(state['ema'], 'ema')
        for name, average in run.averages.items():
            if name not in state['ema']:
                raise UserError(f'"ema" lacks the average "{name}"')
            check_module(average.module, state['ema'][name], f'ema.{name}')
        check_module(run.objective, state['objective'], 'objective')
        check_optimizer(state['optimizer'], run)
        check_stats(state.get('stats', []))
        own_sampling(run.net)  # it came with the state, and would otherwise fail only at the next grid of samples
    except UserError as err:
        raise UserError(f'{path}: cannot resume from this state: {err.message}; is it damaged? Resume from an older state') from None
    groups = run.optimizer.state_dict()['param_groups']
    return {**state, 'optimizer': {'state': state['optimizer']['state'], 'param_groups': groups}}


def check_progress(progress: dict, batch: int) -> None:
    """Refuses counts that are impossible for a run with this global batch size."""
    _check_dict(progress, 'progress')
    for name in ('nimg', 'step', 'tick', 'log_bytes'):
        _check_count(progress, name, 'progress')
    _check_number(progress.get('seconds'), 'progress.seconds')
    stream = progress.get('stream')
    _check_dict(stream, 'progress.stream')
    for name in ('cursor', 'used'):
        _check_count(stream, name, 'progress.stream')
    if progress.get('tick_nimg') is not None:
        _check_count(progress, 'tick_nimg', 'progress')
        if progress['tick_nimg'] > progress['nimg']:
            raise UserError(f'"progress.tick_nimg" must not be above "progress.nimg", got {progress["tick_nimg"]}')
    pending = progress.get('pending', [])
    if not isinstance(pending, list) or not all(name in PENDING for name in pending):
        raise UserError(f'"progress.pending" must be a list of {", ".join(PENDING)}, got {_shown(pending)}')
    scale = progress.get('loss_scale')
    if not isinstance(scale, list | tuple) or len(scale) != 2:
        raise UserError(f'"progress.loss_scale" must be two numbers, got {_shown(scale)}')
    for value in scale:
        _check_number(value, 'progress.loss_scale')
    nimg, used = progress['nimg'], stream['used']
    if not (nimg == progress['step'] * batch == used <= stream['cursor']) or not scale[0]:
        raise UserError(f'"progress" contradicts itself: {nimg} images in {progress["step"]} steps of {batch}, {used} pairs used of '
                        f'{stream["cursor"]} drawn, loss scale {scale[0]}')


def check_module(module: torch.nn.Module, found: object, where: str) -> None:
    """Refuses a state dict whose names, shapes or dtypes are not those of the module."""
    try:
        check_tensors(found)
        check_weights(module, found)
    except UserError as err:
        raise UserError(f'"{where}": {err.message}') from None
    for name, own in module.state_dict().items():
        if found[name].dtype != own.dtype:
            raise UserError(f'"{where}": {name} is {_shown(found[name].dtype)}, and must be {_shown(own.dtype)}')


def check_optimizer(found: object, run: Any) -> None:
    """Refuses a state that does not belong to the run's kind of optimizer and its parameters."""
    _check_dict(found, 'optimizer')
    _check_dict(found.get('state'), 'optimizer.state')
    own, groups = run.optimizer.state_dict()['param_groups'], found.get('param_groups')
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise UserError(f'"optimizer.param_groups" must be a list of objects, got {_shown(groups)}')
    if [group.get('params') for group in groups] != [group['params'] for group in own]:
        raise UserError('"optimizer.param_groups" are those of another network')
    params = run.sharding.params
    expected, probe = example(run.config.optimizer)
    for index, entry in found['state'].items():
        where = f'optimizer.state.{_shown(index)}'
        if type(index) is not int or not 0 <= index < len(params):
            raise UserError(f'"{where}" belongs to no parameter of this network')
        _check_dict(entry, where)
        for name, value in expected.items():
            like = params[index].shape if torch.is_tensor(value) and value.shape == probe.shape else None
            _check_moment(entry.get(name), value, like, f'{where}.{name}')


def check_stats(stats: object) -> None:
    """Refuses what cannot be a list of training_stats.Collector.state() results, one per rank."""
    if not isinstance(stats, list):
        raise UserError(f'"stats" must be a list, got {_shown(stats)}')
    moments = lambda value, rows: torch.is_tensor(value) and value.dtype == torch.float64 and list(value.shape) == [*rows, 3]
    table = lambda value: (isinstance(value, list) and len(value) == 2 and isinstance(value[0], list)
                           and all(isinstance(label, str) for label in value[0]) and moments(value[1], [len(value[0])]))
    for found in stats:
        parts = [found.get(key) for key in ('sums', 'tables')] if isinstance(found, dict) else [None, None]
        if not (all(isinstance(part, dict) and all(isinstance(name, str) for name in part) for part in parts)
                and all(moments(value, []) for value in parts[0].values()) and all(map(table, parts[1].values()))):
            raise UserError('"stats" must hold sums and tables of reported values only')


def example(config: OptimizerConfig) -> tuple[dict, torch.nn.Parameter]:
    """({name: value} that the optimizer of an OptimizerConfig keeps for a parameter, that parameter)."""
    param = torch.nn.Parameter(torch.zeros(2, 3, 5, 7))  # a shape that nothing else has by chance
    param.grad = torch.zeros_like(param)
    optimizer = build_optimizer(config, [param])
    optimizer.step()
    return optimizer.state[param], param


def _check_moment(value, own, shape, where):
    """Refuses a value that cannot replace `own`: a tensor of the parameter's `shape`, any other tensor, or a number of 0 or more."""
    if not torch.is_tensor(own):
        if isinstance(own, int | float) and not isinstance(own, bool):
            _check_number(value, where)
        return
    if not torch.is_tensor(value) or not value.is_floating_point():
        raise UserError(f'"{where}" must be a tensor of floating-point numbers, got {_shown(value)}')
    if value.shape != (own.shape if not own.ndim else shape or value.shape):
        raise UserError(f'"{where}" has the shape {list(value.shape)}, and must have {list(own.shape if not own.ndim else shape)}')
    if not own.ndim:
        _check_number(value.item(), where)  # the number of steps


def _check_dict(value, where):
    if not isinstance(value, dict):
        raise UserError(f'"{where}" must be an object, got {_shown(value)}')


def _check_count(values, name, where):
    if type(values.get(name)) is not int or not 0 <= values[name] < MOST:
        raise UserError(f'"{where}.{name}" must be a whole number of 0 or more, got {_shown(values.get(name))}')


def _check_number(value, where):
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f'"{where}" must be a number of 0 or more, got {_shown(value)}')


def _shown(value):
    """A short text for a value of any kind."""
    if torch.is_tensor(value):
        return f'a tensor of {_shown(value.dtype)} {list(value.shape)}'
    plain = value is None or isinstance(value, int | float | str | torch.dtype)
    return str(value).removeprefix('torch.')[:50] if plain else type(value).__name__
