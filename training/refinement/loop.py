# SPDX-License-Identifier: Apache-2.0
"""The refinement loop (SFBD; Dataloops): rounds of restoring the noisy images with the last network, and training on from it.

DIR/rounds.json holds the settings and what is finished; DIR/round-01-data.npz the images of round 1, DIR/round-01 its run. A command that
was interrupted goes on where it stopped: the set of a round by its finished parts, its training by train.py --resume=latest."""

import functools
import glob
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dnnlib import EasyDict, UserError
from dnnlib.files import read_json, write_json
from dnnlib.fingerprint import data_differences
from dnnlib.lock import FolderLock
from metrics.detectors import DETECTORS
from torch_utils import distributed, misc, numerics, registry
from torch_utils.monitor import STOPPED
from training.checkpoints.load import check_denoiser, load_network
from training.evaluation.proximal import Proximal
from training.refinement.noisy import NoisySet, options_of
from training.refinement.restoring import Restoring
from training.refinement.schedules import SCHEDULES
from training.run import folder
from training.run.config import Config
from training.sampling import pieces
from training.sampling.labels import drawn
from training.sampling.steppers import STEPPERS

ROOT = Path(__file__).resolve().parent.parent.parent  # where the scripts are
ROUNDS = 'rounds.json'
MOST = 50_000  # images of a proximal FID, unless the user asks for more
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
RARE_SNAPSHOTS = 10 ** 6  # ticks: only that at the end


# ----------------------------------------------------------------------------------------------------
# The pieces that the options name


def open_noisy(o: EasyDict) -> tuple[str, Config, NoisySet]:
    """(path of the options, Config, NoisySet) of the network's run."""
    path, config = options_of(o.network, o.config)
    return path, config, NoisySet(config, o.data)


def open_net(ref: str, o: EasyDict, noisy: NoisySet) -> torch.nn.Module:
    """The network on its device, checked to be one of such images."""
    net = load_network(ref, device=distributed.pick_device(o.device))
    check_denoiser(net, f'--network={ref}')
    noisy.check_fits(net, ref)
    return net


def pick_sampler(o: EasyDict) -> Callable:
    """The stepper that --sampler names, with its keys bound; refused if it refuses them."""
    stepper = registry.build(o.sampler, STEPPERS, '--sampler')
    try:
        stepper(None, torch.zeros([1, 1, 1, 1], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64), None)
    except ValueError as err:
        raise UserError(f'--sampler={o.sampler}: {err}') from None
    if registry.parse(o.sampler)[1].get('stop_sigma'):
        raise UserError(f'--sampler={o.sampler}: where a round stops is said by --schedule; leave stop_sigma out')
    return stepper


def pick_ends(o: EasyDict, noisy: NoisySet, k: int) -> np.ndarray:
    """s_k of all items, float64 [N]; refused where it leaves nothing to restore."""
    try:
        ends = registry.build(o.schedule, SCHEDULES, '--schedule')(noisy.sigma_n, k)
    except ValueError as err:
        raise UserError(f'--schedule={o.schedule}: {err}') from None
    if not (ends < noisy.sigma_n).any():
        raise UserError(f'--schedule={o.schedule}: round {k} stops at {ends.min():g}, and no image has a higher level (the highest is '
                        f'{noisy.sigma_n.max():g})')
    return ends


def restoring(o: EasyDict, noisy: NoisySet, net: torch.nn.Module, k: int, dest: str) -> Restoring:
    """The Restoring of round k."""
    return Restoring(noisy, net, pick_ends(o, noisy, k), dest, k=k, sampler=pick_sampler(o), spec=o.sampler, steps=o.steps, seed=o.seed)


def open_proximal(o: EasyDict, noisy: NoisySet) -> Proximal:
    """The noisy side of proximal FID, of all noisy images."""
    made = registry.build(o.detector, DETECTORS, '--detector')
    detector = distributed.first_on_node(made, device=distributed.pick_device(o.device))
    return Proximal(lambda rows: noisy.images(noisy.items[rows]), noisy.sigma_n[noisy.items], detector, noisy.dataset.form.units, o.batch)


def proximal(o: EasyDict, noisy: NoisySet, side: Proximal, net: torch.nn.Module, ref: str) -> dict:
    """The proximal FID of a network, as rounds.json holds it."""
    labels = drawn(noisy.labels(noisy.items)) if net.label_dim else None
    in_full = pieces.sampler_pieces(net, o.sample_steps, stop_sigma=0.0)
    found = side.distance(net, in_full, num=o.num or min(len(noisy.items), MOST), seed=o.seed, labels=labels, who=f'--network={ref}')
    return {**found, 'seed': o.seed}


def value_of(found: dict) -> tuple[str, float]:
    """(name, value) of a proximal FID."""
    name = next(iter(found))
    return name, found[name]


# ----------------------------------------------------------------------------------------------------
# Commands


def run_restore(o: EasyDict) -> None:
    """`restore`: the set of one round alone."""
    _begin(o)
    if os.path.exists(o.dest):
        raise UserError(f'--dest={o.dest}: exists; choose a new name')
    noisy = open_noisy(o)[2]
    made = restoring(o, noisy, open_net(o.network, o, noisy), o.round, o.dest)
    made.run(o.batch)
    distributed.print0(f'{len(made.items)} of {len(noisy.dataset)} images restored to {_span(made.ends[made.items])} -> {o.dest}')


def run_proximal(o: EasyDict) -> None:
    """`proximal`: the distance of each network, one line and one entry of the JSON each."""
    _begin(o)
    noisy, found = open_noisy(EasyDict(o, network=o.networks[0]))[2], []
    side = open_proximal(o, noisy)
    for ref in o.networks:
        net = open_net(ref, o, noisy)
        found.append({'network': ref, 'sha256': misc.state_digest(net), 'proximal': proximal(o, noisy, side, net, ref)})
        distributed.print0('{1:<12.6g} {0}  {2}'.format(*value_of(found[-1]['proximal']), ref))
    if o.out_path:
        distributed.from_rank0(write_json, o.out_path, {'networks': found})


def _begin(o):
    if o.threads:
        torch.set_num_threads(o.threads)
    distributed.init()
    numerics.set_numerics()


def run_rounds(o: EasyDict) -> None:
    """The loop. Raises SystemExit with train.py's exit code where that stopped early."""
    if distributed.size() > 1:
        raise UserError('the loop starts its ranks itself: run it without torchrun, with --gpus=N')
    _begin(o)
    options, config, noisy = open_noisy(o)
    pick_sampler(o)
    for k in range(1, o.rounds + 1):
        pick_ends(o, noisy, k)
    net = open_net(o.network, o, noisy)
    os.makedirs(o.outdir, exist_ok=True)
    lock = FolderLock(o.outdir)
    if owner := lock.acquire(folder.LOCK_WAIT_SEC):
        raise UserError(f'--outdir={o.outdir} is in use by {owner}: wait for that loop to end, stop it, or choose another folder')
    try:
        Loop(o, options, config, noisy, net).run()
    finally:
        lock.release()


class Loop:
    """The rounds of one folder, which the caller has locked. options: path of the options of the run; net: its network."""

    def __init__(self, o: EasyDict, options: str, config: Config, noisy: NoisySet, net: torch.nn.Module) -> None:
        self.o, self.options, self.config, self.noisy = o, os.path.abspath(options), config, noisy
        self._side, self._net = None, net
        folder.clear(o.outdir)
        for left in glob.glob(os.path.join(glob.escape(o.outdir), '.round-*-data.npz-*')):
            if len(os.path.basename(left).rpartition('-')[2]) != 12:  # not parts, but an unfinished set
                shutil.rmtree(left, ignore_errors=True)
        self.settings = {
            '--network': misc.state_digest(net), '--config': _text(config.run.command), **noisy.facts(), '--schedule': o.schedule,
            '--sampler': o.sampler, '--steps': o.steps, '--duration': o.duration, '--seed': o.seed, '--detector': o.detector,
            '--num': o.num, '--sample-steps': o.sample_steps, 'options of train.py': list(o.train)}
        self.entries = self._known() or [{'round': 0, 'network': os.path.abspath(o.network), 'sha256': misc.state_digest(net)}]
        self._save()

    def run(self) -> None:
        """Does what is missing, and prints the result."""
        o = self.o
        for k in range(o.rounds + 1):
            if k == len(self.entries):
                made = self._restore(k)
                snapshot = self._train(k)
                self._net = open_net(snapshot, o, self.noisy)
                self.entries.append({'round': k, 'ends': made, 'data': os.path.basename(self._data(k)),
                                     'network': os.path.relpath(snapshot, o.outdir), 'sha256': misc.state_digest(self._net)})
                self._save()
            if o.num != 0 and 'proximal' not in self.entries[k]:
                self.entries[k]['proximal'] = self._proximal(k)
                self._save()
                print('round {}: {} {:.6g}, images noised to their levels against the noisy ones'.format(
                    k, *value_of(self.entries[k]['proximal'])), flush=True)
        self._tell()

    def place(self, k: int) -> str:
        """Path of the network after round k."""
        return os.path.join(self.o.outdir, self.entries[k]['network'])

    # ---- stages

    def _restore(self, k):
        """Makes the set of round k unless it is there; returns [lowest, highest] level of its restored images."""
        o, dest = self.o, self._data(k)
        made = restoring(o, self.noisy, self._open(k - 1), k, dest)
        span = [made.ends[made.items].min().item(), made.ends[made.items].max().item()]
        if os.path.exists(dest):
            return span
        print(f'round {k} of {o.rounds}: restoring {len(made.items)} images from {_span(self.noisy.sigma_n[made.items])} to '
              f'{_span(made.ends[made.items])} by {o.sampler}', flush=True)
        if o.gpus > 1:
            self._call(['refine.py', 'restore', f'--network={self.place(k - 1)}', f'--round={k}', f'--dest={dest}',
                        *self._told('schedule', 'sampler', 'steps', 'seed', 'batch', 'threads', 'device')], f'round {k}: restoring')
        else:
            made.run(o.batch)
        return span

    def _train(self, k):
        """Trains on in DIR/round-0k; returns its last snapshot."""
        o, run_dir = self.o, os.path.join(self.o.outdir, f'round-{k:02d}')
        self._net = None  # leaves the memory of the device to the training
        held_out = self.config.data.validation and self.config.data.validation.share
        seed = self.config.run.seed if held_out else self.config.run.seed + k  # which also chooses the held-out images
        print(f'round {k} of {o.rounds}: training on for {o.duration:g} million images in {run_dir}', flush=True)
        self._call(['train.py', f'--config={self.options}', f'--data={self._data(k)}', f'--transfer={self.place(k - 1)}', '--sigma=0',
                    '--corruption-probability=0', f'--outdir={run_dir}', '--nosubdir', '--resume=latest', f'--duration={o.duration}',
                    f'--seed={seed}', *([] if self.config.run.snapshot_ticks else [f'--snap={RARE_SNAPSHOTS}']),
                    *([f'--threads={o.threads}'] if o.threads else []), *o.train], f'round {k}: training')
        return last_snapshot(run_dir)

    def _proximal(self, k):
        o = self.o
        if o.gpus > 1:
            path = os.path.join(o.outdir, f'.proximal-{k:02d}.json')
            self._call(['refine.py', 'proximal', f'--network={self.place(k)}', f'--out-path={path}',
                        *self._told('detector', 'num', 'sample_steps', 'seed', 'batch', 'threads', 'device')], f'round {k}: proximal FID')
            found = read_json(path)['networks'][0]['proximal']
            os.unlink(path)
            return found
        self._side = self._side or open_proximal(o, self.noisy)
        return proximal(o, self.noisy, self._side, self._open(k), self.place(k))

    def _open(self, k):
        """The network after round k."""
        if self._net is None or misc.state_digest(self._net) != self.entries[k]['sha256']:
            self._net = open_net(self.place(k), self.o, self.noisy)
            if misc.state_digest(self._net) != self.entries[k]['sha256']:
                raise UserError(f'{self.place(k)}: has other weights than {ROUNDS} records for round {k}; choose another --outdir')
        return self._net

    def _call(self, command, what):
        """Runs one of the scripts, on --gpus ranks. Raises SystemExit with its exit code where it fails or is stopped."""
        script, *args = command
        ranks = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={self.o.gpus}'] if self.o.gpus > 1 else []
        code = call([sys.executable, *ranks, str(ROOT / script), *args])
        if code:
            print(f'{what}: {"stopped" if code == STOPPED else f"failed with exit code {code}"}; the same command continues it', flush=True)
            raise SystemExit(code)

    def _told(self, *names):
        """Options of this command that a stage takes as well."""
        given = {name.replace('_', '-'): self.o[name] for name in (*names, 'data')}
        return [f'--config={self.options}', *(f'--{name}={value}' for name, value in given.items() if value is not None)]

    # ---- files

    def _data(self, k):
        return os.path.join(self.o.outdir, f'round-{k:02d}-data.npz')

    def _save(self):
        measured = [k for k, entry in enumerate(self.entries) if 'proximal' in entry]
        best = min(measured, key=lambda k: value_of(self.entries[k]['proximal'])[1]) if measured else len(self.entries) - 1
        self.chosen = best
        write_json(os.path.join(self.o.outdir, ROUNDS), {'settings': self.settings, 'rounds': self.entries, 'chosen': best}, null=True)

    def _known(self):
        """The finished rounds in the folder, None in a new one. Raises UserError for those of another command."""
        path = os.path.join(self.o.outdir, ROUNDS)
        if not os.path.exists(path):
            return None
        found = read_json(path)
        old, entries = found.get('settings'), found.get('rounds')
        if not isinstance(old, dict) or not isinstance(entries, list) or not all(
                isinstance(entry, dict) and {'network', 'sha256'} <= entry.keys() for entry in entries) or not entries:
            raise UserError(f'{path}: does not hold the rounds of a refinement loop; choose another --outdir')
        if told := differences(old, self.settings):
            raise UserError(f'--outdir={self.o.outdir}: its rounds were made with other options ({"; ".join(told)}); give the same ones, '
                            'or another --outdir')
        return entries

    def _tell(self):
        """Prints the network of each round, and the chosen one."""
        last = min(self.o.rounds, len(self.entries) - 1)
        for k in range(last + 1):
            found = self.entries[k].get('proximal')
            told = '{} {:.6g}'.format(*value_of(found)) if found else 'not measured'
            print(f'round {k}: proximal {told}  {os.path.relpath(self.place(k))}')
        why = 'lowest proximal distance' if 'proximal' in self.entries[self.chosen] else 'the last, since none was measured'
        print(f'Chosen: round {self.chosen} ({why}): {os.path.relpath(self.place(self.chosen))}', flush=True)


def differences(old: dict, new: dict) -> list[str]:
    """Readable differences between the settings of two loops."""
    found = [f'--data: {text}' for text in data_differences(old.get('data'), new['data'])]
    for name in new:
        if name == 'data' or old.get(name) == new[name]:
            continue
        short = lambda value: str(value) if len(str(value)) < 60 else f'{str(value)[:57]}...'
        found.append(f'{name}: {short(old.get(name))}, now {short(new[name])}')
    return found


def last_snapshot(run_dir: str) -> str:
    """Path of the last snapshot in a run's folder. Raises UserError where there is none."""
    found = sorted(path for path in Path(run_dir).glob('network-snapshot-*') if path.is_dir())
    if not found:
        raise UserError(f'{run_dir}: the training ended without a snapshot; see its log.txt')
    return str(found[-1])


def call(command: Sequence[str]) -> int:
    """Runs a command to its end; signals to this process are passed on to it. Returns its exit code, 128 + n if signal n ended it."""
    process = subprocess.Popen(command)
    handlers = {number: signal.signal(number, functools.partial(_forward, process)) for number in FORWARDED}
    try:
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _forward(process, number, frame):
    process.send_signal(number)


def _text(command):
    """The options of a run's command as text, in one order."""
    return ' '.join(f'--{key.replace("_", "-")}={command[key]}' for key in sorted(command))


def _span(levels):
    low, high = float(np.min(levels)), float(np.max(levels))
    return f'{low:.4g}' if low == high else f'{low:.4g} to {high:.4g}'
