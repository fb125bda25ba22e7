# SPDX-License-Identifier: Apache-2.0
"""Attacks (see tests/support/hostile.py) on what reads states, networks, averages and statistics: a class for each kind of file.

Kind(folder) makes sound files in the folder and reads them once; write(draws) puts a damaged file in the place of a sound one; read()
opens it as the program does; check() fails where a refused file has changed what it must not."""

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from dnnlib import UserError, hub
from metrics.statistics import Statistics, load_statistics, save_statistics
from tests.fuzz import mutators
from tests.support import GOLDEN, edm_pickle, hostile, tiny
from tests.support.hostile import mutate, mutate_json, pick
from torch_utils import checkpoint, misc
from training.checkpoints import diffusers, load, posthoc, publish
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.networks import preconditioning
from training.run.config import from_json, to_json

SONG = {'img_resolution': 8, 'img_channels': 1, 'model_type': 'SongUNet', 'model_channels': 4, 'channel_mult': [1, 2], 'num_blocks': 1,
        'attn_resolutions': [4], 'augment_dim': 9, 'embedding_type': 'fourier', 'encoder_type': 'residual', 'label_dim': 3,
        'resample_filter': [1, 3, 3, 1], 'dropout': 0.1, 'sigma_data': 0.5, 'units': {'offset': 0.0, 'scale': 1.0}}
ADM = {'img_resolution': [8, 16], 'img_channels': 2, 'model_type': 'DhariwalUNet', 'model_channels': 4, 'channel_mult': [1, 2],
       'num_blocks': 1, 'attn_resolutions': [4], 'precond': 'iddpm', 'diffusion': 'cosine:steps=20', 'prediction': 'v',
       'sampling': {'sampler': 'dpmpp_2m', 'steps': 3}}
EDM2 = {'img_resolution': [8, 16], 'img_channels': 4, 'label_dim': 3, 'model_type': 'EDM2UNet', 'model_channels': 8, 'channel_mult': [1, 2],
        'num_blocks': 1, 'attn_resolutions': [4], 'channels_per_head': 8, 'clip_act': 256, 'dropout': 0.1, 'label_balance': 0.5,
        'resample_filter': [1, 1], 'channel_mult_noise': 1, 'channel_mult_emb': None, 'use_fp16': True}
VP = {**{key: value for key, value in SONG.items() if key != 'sigma_data'}, 'precond': 'vp', 'M': 50, 'beta_d': 19.9}
EVIL = [edm_pickle.ask_for(*name, protocol)[2:-1] for name in (('os', 'mkdir'), ('builtins', 'eval')) for protocol in (3, 4)]


def build(config):
    with misc.seeded('fuzz'):
        return preconditioning.build_network(config).eval().requires_grad_(False)


class Kind:
    """One sound file, `path`, of which damage() makes another; those that have several files override write()."""

    def __init__(self, folder):
        self.folder, self.path = Path(folder), None
        with contextlib.redirect_stdout(io.StringIO()):
            self.prepare(self.folder)
            self.read()  # whatever is imported late is in by now
        for encoding in ('utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-le', 'utf-32-be', 'cp437'):
            ''.encode(encoding)  # likewise: json guesses encodings, and names in zip files have one

    def __call__(self, draws):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of zipfile, about names that are there twice
            self.write(draws)
        return self.judge

    def judge(self):
        """Reads. Warnings, which are lines that nobody asked for, are failures; so is memory that PyTorch was refused."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            try:
                self.read()
            except UserError as err:
                cause = err
                while cause is not None:
                    if any(words in str(cause) for words in ('allocate memory', 'bad_alloc')):
                        raise MemoryError(str(cause)) from err
                    cause = cause.__context__
                self.check()
                raise
        assert not seen, f'warns: {seen[0].message}'

    def write(self, draws):
        self.path.write_bytes(self.damage(draws))

    def damage(self, draws):
        raise NotImplementedError

    def check(self):
        pass


class Torch(Kind):
    """What is written by torch.save: damaged as bytes, zip file, pickle, and as a tree that is saved anew."""

    share_of_trees = 0.4

    def load_base(self, data):
        self.data, self.parts = data, mutators.members(data)
        self.tree = torch.load(io.BytesIO(data), weights_only=True)
        self.name = next(name for name, _ in self.parts if name.endswith('/data.pkl'))
        self.content = dict(self.parts)[self.name]
        self.tokens = mutators.tokens(self.content)

    def damage(self, draws):
        kind = draws.random()
        if kind < self.share_of_trees:
            return self.damaged_tree(draws)
        kind = (kind - self.share_of_trees) / (1 - self.share_of_trees)
        if kind < 0.15:
            return mutate(self.data, draws)
        if kind < 0.3:
            return mutators.damage_zip_headers(self.data, draws)
        if kind < 0.45:
            return mutators.pack(mutators.damage_zip_members(self.parts, draws))
        if kind < 0.5:
            parts, names = mutators.bomb_members(self.parts, draws)
            return mutators.pack(parts, compressed=names)
        if kind < 0.55:
            return self.legacy(draws)
        content = mutators.damage_pickle(self.tokens, draws, EVIL) if kind < 0.9 else mutate(self.content, draws)
        return mutators.pack([(name, content if name == self.name else part) for name, part in self.parts])

    def damaged_tree(self, draws):
        return self.saved(mutators.damage_tree(self.tree, draws))

    def saved(self, tree, **options):
        file = io.BytesIO()
        try:
            torch.save(tree, file, **options)
        except RecursionError:
            sys.setrecursionlimit(20_000)
            torch.save(tree, file, **options)
            sys.setrecursionlimit(1000)
        return file.getvalue()

    def legacy(self, draws):
        """PyTorch's older format, a row of pickles, damaged, and with sizes of storages that lie."""
        data = self.saved(self.tree, _use_new_zipfile_serialization=False)
        return mutate(data, draws) if draws.random() < 0.5 else mutate(data[:5000], draws) + data[5000:]


class State(Torch):
    """A training state that a run continues from."""

    flags = ['--cbase=4', '--cres=1', '--power-ema=0.05', '--weight=learned']
    share_of_trees = 0.55

    def prepare(self, folder):
        self.run = self.make_run()
        self.run.save_state()
        self.run.finish_states()
        (self.path,) = self.folder.glob('training-state-*.pt')
        self.load_base(self.path.read_bytes())
        self.digest = self.state_digest()

    def make_run(self):
        run = tiny.make_run(self.folder, *self.flags)
        for _ in range(2):
            run.step()
        return run

    def damaged_tree(self, draws):
        part = pick(['', 'options', 'progress', 'progress', 'net', 'ema', 'optimizer', 'optimizer', 'objective'], draws)
        return self.saved(mutators.damage_tree(self.tree, draws, below=(part,) if part else ()))

    def state_digest(self):
        run = self.run
        return tiny.digest({'net': run.net.state_dict(), 'ema': [average.state_dict() for average in run.averages.values()],
                            'optimizer': run.optimizer.state_dict(), 'objective': dict(run.objective.state_dict()),
                            'progress': dict(run.progress), 'stream': run.data.stream.state(), 'scale': run.scale.state()})

    def write(self, draws):
        if self.state_digest() != self.digest:
            self.run = self.make_run()
            self.digest = self.state_digest()
        super().write(draws)

    def read(self):
        state = checkpoint.load(self.path)
        told = to_json(from_json(state['options']))
        if not checkpoint.differences(told, to_json(self.run.config)):
            self.run.restore(state, str(self.path))
            self.run.step()
            self.digest = self.state_digest()

    def check(self):
        assert self.state_digest() == self.digest, 'changed a part of the run before it was refused'


class DiscreteState(State):
    """A training state of a discrete-time objective, whose losses are part of it."""

    flags = ['--cbase=4', '--cres=1', '--precond=iddpm', '--objective=hybrid', '--diffusion=cosine:steps=20', '--timesteps=second_moment']


class StateAsNetwork(Torch):
    """A training state that a network is taken from, of this version and of 0.1.0."""

    def prepare(self, folder):
        self.path = folder / 'a.pt'
        net = build(SONG)
        state = {key: {} for key in checkpoint.KEYS} | {
            'options': {'network': {'arguments': SONG}}, 'net': net.state_dict(), 'ema': {'halflife': net.state_dict(), 'power_0.050': {}}}
        self.load_base(self.saved(state))
        self.path.write_bytes(self.data)

    def read(self):
        use(load_network(self.path))


class OldWeights(Torch):
    """A folder with the pytorch_model.bin of an old client of the Hub."""

    def prepare(self, folder):
        self.net = folder / 'net'
        shutil.copytree(GOLDEN / 'hub' / 'old_client', self.net)
        self.path = self.net / 'pytorch_model.bin'
        self.load_base(self.path.read_bytes())

    def read(self):
        use(load_network(self.net))


class Snapshot(Kind):
    """A snapshot's folder: config.json and model.safetensors."""

    def prepare(self, folder):
        self.net = folder / 'net'
        self.sound = []
        for config in (SONG, ADM, VP, EDM2):
            save_network(build(config), self.net)
            self.sound.append((config, (self.net / load.WEIGHTS).read_bytes()))

    def write(self, draws):
        config, weights = pick(self.sound, draws)
        text = json.dumps(config).encode()
        if draws.random() < 0.65:
            text = mutate_json(config, draws)
        else:
            weights = mutators.damage_safetensors(weights, draws)
        (self.net / load.CONFIG).write_bytes(text)
        (self.net / load.WEIGHTS).write_bytes(weights)

    def read(self):
        use(load_network(self.net))


class FromHub(Snapshot):
    """The same, fetched from the Hub, whose client is replaced."""

    def read(self):
        fetch, hub.fetch = hub.fetch, lambda *args, **kwargs: [str(self.net / load.CONFIG), str(self.net / load.WEIGHTS)]
        try:
            use(load_network('owner/name'))
        finally:
            hub.fetch = fetch


class SingleFile(Kind):
    """Files of any kind under any name, as one argument."""

    def prepare(self, folder):
        net = build(SONG)
        save_network(net, folder / 'net')
        zipped = io.BytesIO()
        torch.save(net.state_dict(), zipped)
        self.sound = [(folder / 'net' / name).read_bytes() for name in (load.WEIGHTS, load.CONFIG)]
        self.sound += [zipped.getvalue(), edm_pickle.snapshot(net, folder / 'marker'), b'<!DOCTYPE html>', b'PK\x05\x06' + bytes(18)]
        self.path = folder / 'file'
        self.path.write_bytes(self.sound[3])

    def damage(self, draws):
        data = pick(self.sound, draws)
        return mutate(data, draws) if draws.random() < 0.9 else data

    def read(self):
        use(load_network(self.path))


class Pickle(Kind):
    """EDM's network-snapshot.pkl."""

    def prepare(self, folder):
        self.sound = self.make(folder / 'marker')
        self.tokens = [[part for part in mutators.tokens(data) if part[:1] != pickle.FRAME] for data in self.sound]
        self.path = folder / 'network-snapshot-000001.pkl'
        self.path.write_bytes(self.sound[0])

    def make(self, marker):
        net = build({**SONG, 'units': None})
        return [edm_pickle.snapshot(net, marker, protocol=protocol, old_torch=protocol == 3) for protocol in (3, 4)]

    def damage(self, draws):
        kind = draws.random()
        if kind < 0.3:
            return mutate(pick(self.sound, draws), draws)
        evil = [*EVIL, *(data[2:] for data in edm_pickle.bombs().values() if len(data) < 2000)]
        if kind < 0.9:
            return mutators.damage_pickle(pick(self.tokens, draws), draws, evil)
        return pickle.dumps(mutators.damage_tree({'ema': [1]}, draws, deep=False), protocol=4)

    def read(self):
        use(load_network(self.path))

    def check(self):
        assert not (self.folder / 'marker').exists(), 'executed the source'


class Diffusers(Kind):
    """A folder in diffusers' layout, which is not read, and what is in it under the names that are."""

    def prepare(self, folder):
        self.top = folder / 'top'
        self.top.mkdir()
        net = build({'img_resolution': 8, 'img_channels': 1, 'model_channels': 128, 'channel_mult': [1], 'num_blocks': 1,
                     'attn_resolutions': []})
        diffusers.write_diffusers(net, self.top)
        self.config = json.loads((self.top / 'unet' / 'config.json').read_text())
        self.weights = (self.top / 'unet' / 'diffusion_pytorch_model.safetensors').read_bytes()[:400_000]

    def write(self, draws):
        (self.top / 'unet' / 'config.json').write_bytes(mutate_json(self.config, draws))
        (self.top / 'unet' / 'model.safetensors').write_bytes(mutators.damage_safetensors(self.weights, draws))
        self.path = pick([self.top, self.top / 'unet', self.top / 'unet', self.top / 'unet' / 'config.json'], draws)

    def read(self):
        if self.path:
            load_network(self.path)


class Options(Kind):
    """options.json of a run and results of eval_fid.py, which a model card tells of."""

    def prepare(self, folder):
        self.run, self.out = folder / 'run', folder / 'out'
        self.out.mkdir()
        self.ref = self.run / 'network-snapshot-000001'
        self.net = build(SONG)
        save_network(self.net, self.ref)
        self.options = to_json(tiny.options(folder))
        self.old = json.loads((GOLDEN / 'version_0.1.0' / 'mix' / 'options.json').read_text())
        made = {'network': 'net', 'sha256': misc.state_digest(self.net), 'weights': 'ema', 'sampler': 'heun', 'steps': 18,
                'evaluations': 35, 'guidance': 1.5, 'guidance_interval': [0.1, None], 'gnet': 'worse', 'gnet_sha256': '1' * 64}
        self.result = {'fid_score': 3.5, 'num_images': 50_000, 'reference': {'num_images': 5, 'split': 'train', 'sha256': '0' * 64},
                       'detector': {'name': 'inception'}, 'generated': {'path': 'out', 'sha256': '2' * 64, 'record': made}}
        (self.run / 'options.json').write_text(json.dumps(self.options))
        (self.run / 'network-snapshot-000001.fid.json').write_text(json.dumps(self.result))

    def write(self, draws):
        options, result = pick([self.options, self.old], draws), self.result
        texts = [json.dumps(options).encode(), json.dumps(result).encode()]
        which = int(draws.integers(2))
        texts[which] = mutate_json((options, result)[which], draws)
        (self.run / 'options.json').write_bytes(texts[0])
        (self.run / 'network-snapshot-000001.fid.json').write_bytes(texts[1])

    def read(self):
        publish.fill(str(self.out), self.net, str(self.ref))
        from_json(load.read_json(self.run / 'options.json'))


class Averages(Kind):
    """Stored power-function averages of a run, from which another is made."""

    def prepare(self, folder):
        self.run = folder / 'run'
        net = build(SONG)
        save_network(net, self.run / 'network-snapshot-000001')
        self.files = {}
        for nimg in (1000, 2000):
            for sigma_rel in (0.05, 0.10):
                path = self.run / f'ema-snapshot-{nimg // 1000:06d}-{sigma_rel:.3f}.safetensors'
                posthoc.write_average(path, posthoc.ema.PowerFunctionEMA(net, sigma_rel), nimg)
                self.files[path] = path.read_bytes()

    def write(self, draws):
        for path, data in self.files.items():
            path.write_bytes(data)
        path = pick(list(self.files), draws)
        data, kind = self.files[path], draws.random()
        if kind < 0.5:
            path.write_bytes(mutators.damage_safetensors(data, draws))
            return
        meta = {'nimg': pick(['0', '-1', '1e3', 'nan', '2000', '9' * 400, '9' * 5000, '1', '', 'x\x1b[0m'], draws),
                'sigma_rel': pick(['0.05', '0', '-1', 'nan', 'inf', '1e-300', '0.29', '7', '', '1e400'], draws)}
        meta.pop(pick(['nimg', 'sigma_rel', 'x'], draws), None)
        tensors = safetensors.torch.load(data)
        if kind < 0.8:
            tensors = mutators.damage_tree(tensors, draws, deep=False)
        tensors = {str(key)[:1000]: value.contiguous().clone() for key, value in tensors.items() if isinstance(value, torch.Tensor)}
        path.write_bytes(safetensors.torch.save(tensors, metadata=meta if kind > 0.7 else {'nimg': '1000', 'sigma_rel': '0.05'}))

    def read(self):
        posthoc.reconstruct(str(self.run), 0.07)


class StatisticsFile(Kind):
    """Statistics of reference images, ours and published ones."""

    def prepare(self, folder):
        self.path = folder / 'ref.npz'
        draws = np.random.default_rng(0)
        rows = draws.normal(size=[20, 4]).astype(np.float32)
        save_statistics(Statistics(rows.mean(0).astype(float), np.cov(rows.T), 20, 'pixels', '0' * 64, 'x.zip', 'train', (1, 2, 2), rows),
                        self.path)
        file = io.BytesIO()
        np.savez_compressed(file, mu=rows.mean(0).astype(float), sigma=np.cov(rows.T))
        self.sound = [self.path.read_bytes(), self.path.read_bytes(), file.getvalue()]

    def damage(self, draws):
        return mutators.damage_npz(pick(self.sound, draws), draws)

    def read(self):
        found = load_statistics(self.path)
        text = f'{found.detector}'
        assert isinstance(found.num_images, int | None) and isinstance(found.detector, str | None), text
        assert isinstance(found.shape, tuple | None) and isinstance(found.split, str | None) and isinstance(found.source, str | None)


class PickledStatistics(Kind):
    """Those of EDM2, and torch-fidelity's caches."""

    def prepare(self, folder):
        self.path = folder / 'ref.pkl'
        rows = np.random.default_rng(0).normal(size=[20, 4]).astype(np.float32)
        stats = {'mu': rows.mean(0), 'sigma': np.asfortranarray(np.cov(rows.T))}
        self.sound = [pickle.dumps({'fid': stats, 'fd_dinov2': stats}, protocol) for protocol in (2, 3, 4, 5)]
        self.tokens = [mutators.tokens(data) for data in self.sound]
        self.saved = []
        for tree in (stats, torch.from_numpy(rows)):
            file = io.BytesIO()
            torch.save(tree, file)
            self.saved.append(mutators.members(file.getvalue()))
        self.path.write_bytes(self.sound[0])

    def damage(self, draws):
        kind = draws.random()
        if kind < 0.3:
            return mutate(pick(self.sound, draws), draws)
        if kind < 0.8:
            return mutators.damage_pickle(pick(self.tokens, draws), draws, EVIL)
        parts = pick(self.saved, draws)
        if kind < 0.9:
            return mutators.pack(mutators.damage_zip_members(parts, draws))
        return mutators.pack([(name, mutators.damage_pickle(mutators.tokens(part), draws, EVIL) if name.endswith('data.pkl') else part)
                              for name, part in parts])

    def read(self):
        found = load_statistics(self.path)
        assert found.cov.shape == (len(found.mean),) * 2 and np.isfinite(found.cov).all()


def use(net):
    """A network that was loaded must also work: one evaluation, one digest."""
    net(torch.zeros(1, net.img_channels, *misc.height_width(net.img_resolution)), torch.tensor(1.0))
    misc.state_digest(net)


ALL = [Averages, Diffusers, DiscreteState, FromHub, OldWeights, Options, Pickle, PickledStatistics, SingleFile, Snapshot, State,
       StateAsNetwork, StatisticsFile]


def judge(log, *args):
    """hostile.main() in a process that was forked for it; what it prints goes to the file `log`."""
    with open(log, 'wb') as out:
        os.dup2(out.fileno(), 1)
    hostile.main(args)


class SomeOfAll:
    """Kinds of which each has something of its own; those that cost little come more often."""

    often = {Averages: 1, Options: 2, PickledStatistics: 3, Snapshot: 4, State: 1, StateAsNetwork: 1, StatisticsFile: 4}

    def __init__(self, folder):
        self.kinds = []
        for kind, count in self.often.items():
            (Path(folder) / kind.__name__).mkdir()
            self.kinds += count * [kind(Path(folder) / kind.__name__)]

    def __call__(self, draws):
        return pick(self.kinds, draws)(draws)
