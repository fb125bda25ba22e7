# SPDX-License-Identifier: Apache-2.0
"""Stored power-function averages of a run, from which averages of any other length are reconstructed afterwards (post-hoc EMA).

One file per average and snapshot: ema-snapshot-000500-0.050.safetensors, with nimg and sigma_rel in its header; or EDM2's published
edm2-img512-xs-0134217-0.050.pkl, whose names say both."""

import os
import re

import safetensors
import safetensors.torch

from dnnlib import UserError, one_line
from dnnlib.files import replacing
from training.checkpoints import load
from training.checkpoints.load import check_tensors, check_weights, load_network, load_weights
from training.networks import ema

PATTERN = re.compile(r'ema-snapshot-[\d.]+-(\d\.\d{3})\.safetensors')
PUBLISHED, SUFFIX = re.compile(r'(.+)-(\d{7})-(\d\.\d{3})\.pkl'), '.pkl'  # network, kimg, sigma_rel


def write_average(path: str | os.PathLike, average: ema.PowerFunctionEMA, nimg: int) -> None:
    """Writes a PowerFunctionEMA after nimg images, in float32, because the factors of a reconstruction can be large."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in average.state_dict().items()}
    header = {'nimg': str(nimg), 'sigma_rel': repr(average.sigma_rel)}
    with replacing(path) as part, open(part, 'wb') as f:
        f.write(safetensors.torch.save(state, metadata=header))


def stored_averages(run: str | os.PathLike) -> list[tuple[str, int, float]]:
    """[(path, nimg, sigma_rel), ...] of a run's folder, or of one of EDM2's snapshots, oldest first. Raises UserError where there are
    none."""
    paths = sorted(os.path.join(run, name) for name in os.listdir(run) if PATTERN.fullmatch(name))
    if not paths:
        return _published_averages(run)
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


def _published_averages(folder):
    """The same of a folder with the snapshots of one of EDM2's networks."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(SUFFIX))
    if not names:
        raise UserError(f'{folder}: holds no ema-snapshot-*.safetensors; train with --power-ema=0.05,0.10 to store them; a folder of '
                        "EDM2's snapshots holds NETWORK-KIMG-WIDTH.pkl, such as edm2-img512-xs-0134217-0.050.pkl")
    found, networks = [], set()
    for name in names:
        try:
            network, kimg, sigma_rel = PUBLISHED.fullmatch(name).groups()
            nimg = (int(kimg) * 1000 + 999) // 1024 * 1024  # names are rounded down; snapshots lie at multiples of 1024 images
            ema.exponent(float(sigma_rel))
            if not nimg:
                raise ValueError('no images')
        except (AttributeError, ValueError):
            raise UserError(f'{folder}: {name} is not named as a stored average of EDM2, NETWORK-KIMG-WIDTH.pkl, such as '
                            'edm2-img512-xs-0134217-0.050.pkl; move it elsewhere') from None
        networks.add(network)
        found.append((os.path.join(folder, name), nimg, float(sigma_rel)))
    if len(networks) > 1:
        raise UserError(f'{folder}: holds snapshots of {len(networks)} networks ({", ".join(sorted(networks)[:3])}); each network needs a '
                        'folder of its own')
    return sorted(found, key=lambda item: item[1])


def reconstruct(run: str | os.PathLike, sigma_rel: float, nimg: int | None = None) -> tuple:
    """(network, sources, error): the average of length sigma_rel at nimg images (default: the last), in eval mode.

    sources: [(file name, factor), ...] of the averages used. error: ema.profile_error, the relative error of their profile.
    run: the folder of a run, whose snapshots have the network's configuration, or one of the snapshots that EDM2 published of a network;
    of these nimg may be the whole thousands of their names. The result is float32 throughout; its buffers are the last snapshot's."""
    stored = stored_averages(run)
    times, profiles = sorted({item[1] for item in stored}), [item[1:] for item in stored]
    is_published = stored[0][0].endswith(SUFFIX)
    if is_published and nimg is not None:
        nimg = next((time for time in times if nimg == time // 1000 * 1000), nimg)
    target = (times[-1] if nimg is None else nimg, sigma_rel)
    if target[0] not in times:
        near = min(times, key=lambda time: abs(time - target[0]))
        raise UserError(f'{run}: no averages are stored at {target[0] / 1e3:.10g} kimg; the nearest are at {near / 1e3:.10g} kimg')
    try:
        factors = ema.reconstruction(profiles, target)
    except ValueError as err:
        raise UserError(f'{run}: {err}') from None
    used = [(path, factor) for (path, _, _), factor in zip(stored, factors) if factor]
    net = load_network(used[-1][0] if is_published else _newest_snapshot(run)).float()
    parameters = dict(net.named_parameters())
    states = ({name: value for name, value in _read_average(path, net).items() if name in parameters} for path, _ in used)
    load_weights(net, net.state_dict() | ema.combine(states, [factor for _, factor in used]), run)
    if bad := load.non_finite(net):
        raise UserError(f'{run}: the reconstructed weights are not finite: {bad}')
    return net, [(os.path.basename(path), factor) for path, factor in used], ema.profile_error(profiles, target, factors)


def _read_average(path, net):
    """The state dict in a file of write_average, or in a published one as float32. Raises UserError where it is not one of this
    network."""
    if path.endswith(SUFFIX):
        return _read_published(path, net)
    try:
        state = safetensors.torch.load_file(path)
        check_tensors(state)
        check_weights(net, state)
    except safetensors.SafetensorError as err:
        raise UserError(f'{path}: damaged safetensors file: {one_line(err)}') from None
    except UserError as err:
        raise UserError(f'{path}: {err.message}') from None
    return state


def _read_published(path, net):
    config, state = load.read(path)
    differ = sorted(key[:50] for key in {*config, *net.config} if config.get(key) != net.config.get(key))
    try:
        if differ:
            raise UserError(f'this network differs in {", ".join(differ[:3])} from that of the last snapshot')
        check_weights(net, state)
    except UserError as err:
        raise UserError(f'{path}: {err.message}') from None
    return {name: value.float() for name, value in state.items()}


def _newest_snapshot(run):
    folders = sorted(name for name in os.listdir(run) if name.startswith('network-snapshot-'))
    if not folders:
        raise UserError(f'{run}: holds no network-snapshot-*, whose config.json is needed')
    return os.path.join(run, folders[-1])
