# SPDX-License-Identifier: Apache-2.0
"""Stored power-function averages of a run, from which averages of any other length are reconstructed afterwards (post-hoc EMA).

One file per average and snapshot: ema-snapshot-000500-0.050.safetensors, with nimg and sigma_rel in its header."""

import os
import re

import safetensors
import safetensors.torch

from dnnlib import UserError, one_line
from dnnlib.files import replacing
from training.checkpoints.load import check_tensors, check_weights, load_network, load_weights
from training.networks import ema

PATTERN = re.compile(r'ema-snapshot-[\d.]+-(\d\.\d{3})\.safetensors')


def write_average(path: str | os.PathLike, average: ema.PowerFunctionEMA, nimg: int) -> None:
    """Writes a PowerFunctionEMA after nimg images, in float32, because the factors of a reconstruction can be large."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in average.state_dict().items()}
    header = {'nimg': str(nimg), 'sigma_rel': repr(average.sigma_rel)}
    with replacing(path) as part, open(part, 'wb') as f:
        f.write(safetensors.torch.save(state, metadata=header))


def stored_averages(run: str | os.PathLike) -> list[tuple[str, int, float]]:
    """[(path, nimg, sigma_rel), ...] of a run's folder, oldest first. Raises UserError where there are none."""
    paths = sorted(os.path.join(run, name) for name in os.listdir(run) if PATTERN.fullmatch(name))
    if not paths:
        raise UserError(f'{run}: holds no ema-snapshot-*.safetensors; train with --power-ema=0.05,0.10 to store them')
    found = []
    for path in paths:
        try:
            with safetensors.safe_open(path, 'pt') as f:
                header = f.metadata() or {}
            nimg, sigma_rel = int(header['nimg']), float(header['sigma_rel'])
            ema.exponent(sigma_rel)
            if not 0 < nimg < 2 ** 53:
                raise ValueError(f'nimg={nimg} must be above 0')
            found.append((path, nimg, sigma_rel))
        except (safetensors.SafetensorError, KeyError, ValueError, ArithmeticError, OSError) as err:
            raise UserError(f'{path}: not an average written by train.py ({one_line(err)})') from None
    return sorted(found, key=lambda item: item[1])


def reconstruct(run: str | os.PathLike, sigma_rel: float, nimg: int | None = None) -> tuple:
    """(network, sources, error): the average of length sigma_rel at nimg images (default: the last), in eval mode.

    sources: [(file name, factor), ...] of the averages used. error: ema.profile_error, the relative error of their profile.
    The network's configuration is that of the run's snapshots."""
    stored = stored_averages(run)
    times, profiles = sorted({item[1] for item in stored}), [item[1:] for item in stored]
    target = (times[-1] if nimg is None else nimg, sigma_rel)
    if target[0] not in times:
        near = min(times, key=lambda time: abs(time - target[0]))
        raise UserError(f'{run}: no averages are stored at {target[0] / 1e3:g} kimg; the nearest are at {near / 1e3:g} kimg')
    try:
        factors = ema.reconstruction(profiles, target)
    except ValueError as err:
        raise UserError(f'{run}: {err}') from None
    used = [(path, factor) for (path, _, _), factor in zip(stored, factors) if factor]
    net = load_network(_newest_snapshot(run))
    load_weights(net, ema.combine((_read_average(path, net) for path, _ in used), [factor for _, factor in used]), run)
    return net, [(os.path.basename(path), factor) for path, factor in used], ema.profile_error(profiles, target, factors)


def _read_average(path, net):
    """The state dict in a file of write_average. Raises UserError where it is not one of this network."""
    try:
        state = safetensors.torch.load_file(path)
        check_tensors(state)
        check_weights(net, state)
    except safetensors.SafetensorError as err:
        raise UserError(f'{path}: damaged safetensors file: {one_line(err)}') from None
    except UserError as err:
        raise UserError(f'{path}: {err.message}') from None
    return state


def _newest_snapshot(run):
    folders = sorted(name for name in os.listdir(run) if name.startswith('network-snapshot-'))
    if not folders:
        raise UserError(f'{run}: holds no network-snapshot-*, whose config.json is needed')
    return os.path.join(run, folders[-1])
