# SPDX-License-Identifier: Apache-2.0
"""The loop: setup, restore, step, report, save. Time is counted in pairs used (nimg); a step sees one global batch."""

import contextlib
import os
import time

import click
import numpy as np
import psutil
import torch

from dnnlib import EasyDict, format_time
from torch_utils import checkpoint, distributed, misc, training_stats
from training import hub, registry, validation
from training.augment import AugmentPipe
from training.consistency import CHAINS, ConsistencyTerm
from training.corruption import Corruption
from training.dataset import ImageDataset, ImageStore
from training.ema import HalfLifeEMA
from training.feed import Feed, micro_batches
from training.generation import sample_grid
from training.loss import AmbientLoss, Objective
from training.noise import NOISE
from training.pairs import PairStream
from training.penalty import PENALTIES
from training.preconditioning import build_network
from training.run_folder import RunFolder, stop_if_orphan
from training.weighting import WEIGHTS

HEARTBEAT_SEC = 60     # a line at least this often, so that nobody wonders whether a run hangs
MAX_SKIPPED = 100      # updates skipped in a row for non-finite gradients before the run is stopped
PRECISIONS = {'fp32': torch.float32, 'tf32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


class TrainStep(torch.nn.Module):
    """The one module that DistributedDataParallel wraps: network and objective, one forward a micro-batch."""

    def __init__(self, net, objective):
        super().__init__()
        self.net, self.objective = net, objective

    def forward(self, batch, randn):
        return self.objective(self.net, batch, randn)


def build_objective(options, net):
    """(noise distribution, Objective) from options['objective'] for this network."""
    o = options['objective']
    noise = registry.build(o['noise'], NOISE, '--noise')
    weight = registry.build(o['weight'], WEIGHTS, '--weight', sigma_data=net.sigma_data)
    penalty = registry.build(o['penalty'], PENALTIES, '--penalty', sigma_data=net.sigma_data)
    probe_pieces(o, weight, penalty)
    terms = {'denoise': AmbientLoss(weight, penalty)}
    if o['consistency']:
        plan = registry.build(o['consistency'], CHAINS, '--consistency')
        try:
            terms['consistency'] = ConsistencyTerm(plan, noise, weight, options['batch'])
        except ValueError as err:
            raise click.ClickException(f'--consistency={o["consistency"]}: {err}') from None
    return noise, Objective(terms)


def probe_pieces(specs, weight, penalty):
    """Functions check their options when they are first called: call them once, before anything is made."""
    one = torch.ones(1, 1, 1, 1)
    for slot, call in [('weight', lambda: weight(one)), ('penalty', lambda: penalty(one, one))]:
        try:
            call()
        except ValueError as err:
            raise click.ClickException(f'--{slot}={specs[slot]}: {err}') from None


class Run:
    """Everything of one run on this rank."""

    def __init__(self, options, folder, device, writers=()):
        """options: the nested dict of JSON types that train.py makes (and options.json holds). writers: callables (fields, nimg)."""
        self.options, self.device, self.writers = options, device, writers
        self.folder = folder
        self.progress = EasyDict(nimg=0, step=0, tick=0, seconds=0.0, log_bytes=0, stream=None)
        self.rank_batch = options['batch'] // distributed.size()
        self.first_row = distributed.rank() * self.rank_batch
        self._setup_numerics()
        self._setup_network()
        self._setup_data()
        self._setup_step()
        self.stats = training_stats.Collector(device)
        self.skipped_in_row = torch.zeros([], device=device)

    # ---- setup

    def _setup_numerics(self):
        tf32 = self.options['precision'] == 'tf32'
        torch.backends.cudnn.benchmark = self.options['bench']
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def _setup_network(self):
        with misc.seeded(self.options['seed'], 'init'):
            net = build_network(self.options['network'])
        self.net = net.to(self.device).train()
        self.net.compute_dtype = PRECISIONS[self.options['precision']]
        if self.options['transfer']:
            transfer_weights(self.options['transfer'], self.net)
        self.noise, self.objective = build_objective(self.options, self.net)
        self.objective.to(self.device)

    def _setup_data(self):
        data, c = self.options['data'], self.options['corruption']
        corruption = Corruption(**c)
        dataset = ImageDataset(data['path'], use_labels=data['use_labels'], keep=data['keep'], xflip=data['xflip'])
        sigma_n = corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape)
        store = ImageStore(dataset, corruption, sigma_n, cache_gib=data['cache_gib'], workers=data['workers'] or None)
        labels = torch.from_numpy(dataset.labels(np.arange(len(dataset)))) if self.net.label_dim else None
        train, held_out = validation.split(dataset.raw_idx, self.options['val'].get('share', 0), self.options['seed'])
        pairing = self.options['objective']['pairing']
        self.stream = PairStream(sigma_n[train], self.noise, pairing, batch=self.options['batch'], seed=self.options['seed'])
        rows = slice(self.first_row, self.first_row + self.rank_batch)
        self.feed = Feed(self.stream, store, train, sigma_n=sigma_n, raw_idx=dataset.raw_idx, labels=labels, rows=rows,
                         device=self.device, workers=data['workers'])
        noisy = int((sigma_n[train] > 0).sum())
        self.data_line = (f'{len(train)} training images of shape {"x".join(map(str, dataset.image_shape))}: {len(train) - noisy} clean, '
                          f'{noisy} noisy ({noisy / len(train):.2%}); {store.nbytes / 2**30:.2f} GiB '
                          f'{"mapped from disk" if store.mapped else "in memory"}; {self.stream.acceptance():.1%} of the images passed '
                          f'are used by --pairing={pairing}')
        self.validation = None
        if self.options['val']:
            self.validation = validation.build(self.options, self.noise, store, dataset, held_out, sigma_n, labels)
        self.augment = AugmentPipe(p=self.options['augment']) if self.options['augment'] else None

    def _setup_step(self):
        inner = torch.compile(self.net) if self.options['compile'] else self.net
        self.train_step = TrainStep(inner, self.objective)
        if torch.distributed.is_initialized():
            ids = [self.device] if self.device.type == 'cuda' else None
            self.train_step = torch.nn.parallel.DistributedDataParallel(self.train_step, device_ids=ids, broadcast_buffers=False)
        self.params = [p for p in (*self.net.parameters(), *self.objective.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.params, fused=True, **self.options['optimizer'])
        self.ema = HalfLifeEMA(self.net, **self.options['ema'])
        if 'consistency' in self.objective.terms:
            self.objective.terms['consistency'].set_teacher(self.ema.module)

    # ---- restore

    def restore(self, state, path):
        """Continues from a state file's content; says what was restored."""
        hub.load_weights(self.net, state['net'], path)
        hub.load_weights(self.ema.module, next(iter(state['ema'].values())), path)
        self.objective.load_state_dict(state['objective'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.progress = EasyDict(state['progress'])
        self.stream.restore(self.progress.stream)
        if distributed.rank() == 0:
            self.folder.rewind_log(self.progress.log_bytes)
        distributed.print0(f'Restored network, EMA, optimizer, objective and data position from {path} ({self.progress.nimg / 1e3:g} kimg)')

    # ---- step

    def step(self):
        """One update on one global batch. Nothing here waits for the device."""
        p, o = self.progress, self.options
        host = self.feed.next()
        draws_of = lambda row: misc.Draws(o['seed'], p.step, self.first_row + row, self.device)
        rounds = -(-self.rank_batch // o['batch_gpu'])
        self.optimizer.zero_grad(set_to_none=True)
        for i, (batch, draws) in enumerate(micro_batches(host, o['batch_gpu'], self.device, draws_of)):
            if self.augment is not None:
                images, augment_labels = self.augment(batch.images, batch.sigma_n, draws)
                batch = batch._replace(images=images, augment_labels=augment_labels)
            with self._sync(i == rounds - 1), misc.seeded(o['seed'], p.step, 'dropout', distributed.rank(), i, device=self.device):
                terms = self.train_step(batch, draws)
                total = sum(term.sum() for term in terms.values())
                (total * (o['loss_scale'] / self.rank_batch)).backward()
            self._report_terms(terms, batch)
        self._update()
        p.nimg += o['batch']
        p.step += 1
        p.stream = host.stream_state

    def _sync(self, last):
        """Gradients are summed over the ranks once a step, in the last round."""
        ddp = isinstance(self.train_step, torch.nn.parallel.DistributedDataParallel)
        return self.train_step.no_sync() if ddp and not last else contextlib.nullcontext()

    def _update(self):
        """Learning rate, Adam, EMA. A non-finite gradient skips the update on the device (found_inf), and is counted."""
        p, o = self.progress, self.options
        for group in self.optimizer.param_groups:
            group['lr'] = o['optimizer']['lr'] * min(p.nimg / max(o['lr_rampup_kimg'] * 1e3, 1e-8), 1)
        grads = [param.grad for param in self.params if param.grad is not None]
        if o['loss_scale'] != 1:
            torch._foreach_mul_(grads, 1 / o['loss_scale'])
        norm = torch.nn.utils.get_total_norm(grads)
        bad = (~torch.isfinite(norm)).float()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        self.optimizer.step()
        self.ema.update(self.net, p.nimg, o['batch'])
        self.skipped_in_row = (self.skipped_in_row + bad) * bad
        self.stats.report('Grad/norm', norm)
        self.stats.report('Grad/skipped', bad)

    def _report_terms(self, terms, batch):
        """Each term under its own name; the denoising term for clean and noisy rows apart. All are sums over C, H, W."""
        noisy = batch.sigma_n.flatten() > 0
        for name, values in terms.items():
            self.stats.report(f'Loss/{name}', values)
        self.stats.report('Loss/denoise/clean', terms['denoise'], mask=~noisy)
        self.stats.report('Loss/denoise/noisy', terms['denoise'], mask=noisy)

    # ---- report

    def report(self, tick_seconds, tick_nimg):
        """Gathers the statistics of a tick, writes one line to stats.jsonl and one to the console. Synchronises once."""
        p = self.progress
        if int(self.skipped_in_row) >= MAX_SKIPPED:
            raise click.ClickException(f'{MAX_SKIPPED} updates in a row had non-finite gradients (step {p.step}, {p.nimg / 1e3:g} kimg): '
                                       'lower --lr, or use --precision=bf16 or fp32; the last saved state is as it was')
        stats = self.stats.flush()
        rate = tick_nimg / max(tick_seconds, 1e-9)
        fields = {'nimg': p.nimg, 'Progress/kimg': p.nimg / 1e3, 'Progress/tick': p.tick, 'Progress/step': p.step,
                  **{name: s['mean'] for name, s in stats.items() if s['mean'] is not None},
                  'Pairs/passed': p.stream['cursor'], 'Pairs/accepted': p.stream['used'] / p.stream['cursor'],
                  'Optimizer/lr': self.optimizer.param_groups[0]['lr'],
                  'Timing/seconds': round(p.seconds, 3), 'Timing/img_per_sec': round(rate, 2)}
        fields |= {f'Resources/{k}': v for k, v in memory_gib(self.device).items()}
        if distributed.rank() == 0:
            self.folder.log({k: misc.as_float(v) if isinstance(v, float) else v for k, v in fields.items()})
            for write in self.writers:
                write(fields, p.nimg)
        left = max(self.options['duration_kimg'] * 1e3 - p.nimg, 0) / max(rate, 1e-9)
        losses = '  '.join(f'{name.removeprefix("Loss/")} {s["mean"]:.5g}' for name, s in stats.items()
                           if name.startswith('Loss/') and s['mean'] is not None and not name.endswith('/nonfinite'))
        skipped = round(stats['Grad/skipped']['mean'] * stats['Grad/skipped']['num'] / distributed.size())
        warning = f'  SKIPPED {skipped} updates (non-finite gradients)' if skipped else ''
        distributed.print0(f'tick {p.tick}  kimg {p.nimg / 1e3:.3f}  time {format_time(p.seconds)}  {losses}  img/s {rate:.1f}  '
                           f'eta {format_time(left)}  mem {fields["Resources/cpu_gib"]:.2f} GiB{warning}')

    def validate(self):
        """Held-out loss of the EMA into stats.jsonl, if asked for."""
        if self.validation is None:
            return
        fields = self.validation(self.ema.module, self.objective.terms['denoise'], self.device)
        if distributed.rank() == 0:
            self.folder.log({'nimg': self.progress.nimg, **fields})
            for write in self.writers:
                write(fields, self.progress.nimg)
        means = '  '.join(f'{name} {fields[name]:.5g}' for name in ('Val/clean', 'Val/noisy') if fields.get(name) is not None)
        distributed.print0(f'    held out: {means}')

    # ---- save

    def save_snapshot(self):
        """EMA network folder and sample grid."""
        if distributed.rank() != 0:
            return
        stop_if_orphan()
        kimg = self.progress.nimg / 1e3
        hub.save_network(self.ema.module, self.folder.numbered('network-snapshot', kimg), card=hub.model_card(self.options, kimg))
        if self.options['samples']:
            sample_grid(self.ema.module, self.options['samples'], self.folder.numbered('samples', kimg, '.png'))

    def save_state(self):
        """Everything needed to continue, in one file."""
        if distributed.rank() != 0:
            return
        stop_if_orphan()
        self.progress.log_bytes = self.folder.log_bytes
        state = dict(options=self.options, progress=dict(self.progress), net=self.net.state_dict(),
                     ema={'halflife': self.ema.module.state_dict()}, optimizer=self.optimizer.state_dict(),
                     objective=self.objective.state_dict())
        checkpoint.save(self.folder.numbered('training-state', self.progress.nimg / 1e3, '.pt'), state)


def memory_gib(device):
    """Memory of this process, and the peak on its GPU since the last call."""
    found = {'cpu_gib': round(psutil.Process(os.getpid()).memory_info().rss / 2**30, 3)}
    if device.type == 'cuda':
        found['gpu_peak_gib'] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
        torch.cuda.reset_peak_memory_stats(device)
    return found


def transfer_weights(ref, net):
    """Copies every tensor of another network that has the same name and shape; says what was left as initialised."""
    source = hub.load_network(ref).state_dict()
    own = net.state_dict()
    fitting = {name: tensor for name, tensor in source.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise click.ClickException(f'--transfer={ref}: none of its tensors fits this network; use its architecture (see its config.json)')
    net.load_state_dict(fitting, strict=False)
    left = sorted(set(own) - set(fitting))
    rest = f'; as initialised: {", ".join(left[:8])}' if left else ''
    distributed.print0(f'Transferred {len(fitting)} of {len(own)} tensors from {ref}{rest}')


def training_loop(options, run_dir, device, writers=(), state=None, state_path=None):
    """Trains until options['duration_kimg'], in the folder run_dir; continues from `state` where one is given."""
    run = Run(options, RunFolder(run_dir, fractional=options['tick_kimg'] % 1 != 0), device, writers)
    distributed.print0(run.data_line)
    if state is not None:
        run.restore(state, state_path)
    total_nimg, tick_nimg = options['duration_kimg'] * 1e3, options['tick_kimg'] * 1e3
    p = run.progress
    tick_start_nimg, tick_start = p.nimg, time.time()
    last_line = time.time()
    distributed.print0(f'Training for {options["duration_kimg"]:g} kimg in {run_dir}')

    while p.nimg < total_nimg:
        stop_if_orphan()
        run.step()
        done = p.nimg >= total_nimg
        if time.time() - last_line > HEARTBEAT_SEC:
            rate = (p.nimg - tick_start_nimg) / (time.time() - tick_start)
            left = format_time((total_nimg - p.nimg) / rate)
            distributed.print0(f'    step {p.step}  kimg {p.nimg / 1e3:.3f}  img/s {rate:.1f}  eta {left}')
            last_line = time.time()
        if not done and p.nimg < tick_start_nimg + tick_nimg:
            continue

        # Tick: one line of statistics, and every so many ticks a snapshot and a state.
        p.tick += 1
        seconds = time.time() - tick_start
        p.seconds += seconds
        run.report(seconds, p.nimg - tick_start_nimg)
        at = lambda every, p=p, done=done: every and (done or p.tick % every == 0)
        if at(options['snapshot_ticks']):
            run.validate()
            run.save_snapshot()
        if at(options['state_ticks']):
            run.save_state()
        p.seconds += time.time() - tick_start - seconds
        tick_start_nimg, tick_start, last_line = p.nimg, time.time(), time.time()

    run.feed.close()
    distributed.barrier()
    return run
