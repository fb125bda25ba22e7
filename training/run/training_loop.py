# SPDX-License-Identifier: Apache-2.0
"""The training loop: setup, restore, step, report, save. Progress is counted in images, that is pairs used (nimg); a step takes one global
batch."""

import contextlib
import os
import re
import time

import psutil
import torch

from dnnlib import EasyDict, UserError, format_time
from dnnlib.files import finite
from torch_utils import distributed, misc, numerics, training_stats
from training.checkpoints import posthoc
from training.checkpoints.card import model_card
from training.checkpoints.save import save_network
from training.data.augment import AugmentPipe
from training.data.batches import micro_batches
from training.networks.interface import COMPILE_OPTIONS, match_layout
from training.networks.rows import attach_row_draws
from training.run import alarms, distill, gradients, schema, unsharded
from training.run.build import build_averages, build_net, build_objective, build_optimizer, build_sharding, load_data, transfer_weights
from training.run.config import Config, from_json, to_json
from training.run.folder import RunFolder, cannot_write, stop_if_orphan
from training.run.metrics import PeriodicMetrics, output_of
from training.run.mirrors import Mirrors
from training.run.optimizer import LearningRate
from training.run.states import StateWriter
from training.run.step import GROUPS, CompiledStep, Outcome, TrainStep, data_parallel
from training.run.stopping import Requests, Signals, Stop
from training.sampling import pieces as sampling
from training.sampling.generate import sample_grid

SHOWN = r'Loss/[^/]+|Loss/{first}/(clean|noisy)'  # losses shown on the console; stats.jsonl has them all
HEARTBEAT_SEC = 60     # print a line at least this often, to show that the run is alive
RETRY_SEC = 60         # between attempts to write a state after a failure


class Run:
    """Everything of one run on this rank."""

    def __init__(self, config: Config, folder: RunFolder, device: torch.device, mirrors: Mirrors | None = None, resuming: bool = False,
                 requests: Requests | None = None) -> None:
        """config: a Config. mirrors: Mirrors, on rank 0. requests: Requests to end early."""
        self.config, self.device, self.mirrors = config, device, mirrors or Mirrors()
        self.folder, self.requests = folder, requests or Requests(Signals())
        self.states, self.missed = StateWriter(config.run.keep_states), set()
        # tick_nimg: nimg at the start of the tick; pending: what is left to do for one that has ended.
        self.progress = EasyDict(nimg=0, step=0, tick=0, tick_nimg=0, pending=[], seconds=0.0, log_bytes=0, stream=None)
        self._start_clock()
        self.rank_batch = config.run.batch // distributed.size()
        self.first_row = distributed.rank() * self.rank_batch
        self._setup_numerics()
        self._setup_network(resuming)
        self.output = output_of(self.net, config.run, device)
        self.metrics = self._metrics() if config.run.metrics else None
        rows = slice(self.first_row, self.first_row + self.rank_batch)
        self.data = load_data(config, self.net, self.noise, rows, device)
        misc.give_memory_back()
        distributed.wait_for_all('reading the data')
        self._setup_step()
        self.stats = training_stats.Collector(device)
        self.guard = gradients.Guard(device)
        self.scale = gradients.LossScale(config.optimizer.loss_scale, dynamic=config.run.precision == 'fp16', device=device)

    # ---- setup

    def _setup_numerics(self):
        numerics.set_numerics(self.config.run.precision, self.config.run.bench)

    def _setup_network(self, resuming):
        config = self.config
        place = 'cpu' if unsharded.wanted(config.run) else self.device
        self.net = build_net(config.network, place, seed=config.run.seed, precision=config.run.precision)
        teacher = distill.open_for(config, self.net)
        if config.network.transfer and not resuming:
            transfer_weights(config.network.transfer, self.net)
        if unsharded.channels_last(config.run, self.device):
            self.net.model.set_channels_last()
        self.net.model.checkpointing = config.run.checkpointing
        self.row_draws = attach_row_draws(self.net)
        self.noise, self.objective = build_objective(config.objective, self.net, config.run.batch, teacher)
        self.objective.to(self.device)
        self.quartiles = self.noise.icdf(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).float().to(self.device)
        self.augment = AugmentPipe(p=config.data.augment) if config.data.augment else None

    def _metrics(self):
        m = self.config.run.metrics
        return PeriodicMetrics(m.num, m.ref, m.names, m.detector, self.output, device=self.device)

    def _setup_step(self):
        step = TrainStep(self.net, self.objective, self.augment, self.quartiles, self.rank_batch)
        self.sharding = build_sharding(self.config.run, self.net, self.device)
        whole = self.config.run.compile and not self.sharding.divides
        self.compiled = CompiledStep(step, self.config.run.batch_gpu, options=COMPILE_OPTIONS) if whole else None
        if self.config.run.compile and self.sharding.divides:
            self.sharding.compile(self.net)  # block by block, because each is gathered before it is computed
        self.train_step = self._wrap(step)
        self.beginners = [module for module in self.train_step.modules() if hasattr(module, 'begin_step')]
        self.noise_scale = self._noise_scale() if self.config.run.gns else None
        groups = self.sharding.groups(self.objective.groups(self.net))
        self.params = [p for group in groups for p in group['params']]
        self.optimizer = build_optimizer(self.config.optimizer, groups)
        self.learning_rate = LearningRate(self.config.optimizer)
        self.averages = build_averages(self.config.optimizer, self.net, self.sharding.copy)
        self.ema = self.averages['halflife']
        if self.config.run.compile and not self.sharding.divides:
            self.ema.module.model.compile(dynamic=False, options=COMPILE_OPTIONS)  # a copy is not compiled
        self.alarms = alarms.Alarms(self.data.inspection, self.ema.module)
        self.objective.set_teacher(self.ema.module)

    def _wrap(self, step):
        """The TrainStep as it is called: on several ranks inside of what averages its gradients over them."""
        return data_parallel(step, self.device) if torch.distributed.is_initialized() and not self.sharding.divides else step

    def _noise_scale(self):
        """Compares the ranks where there are several, otherwise the first micro-batch of a step with the whole batch."""
        batch = self.config.run.batch
        if distributed.size() == 1:
            return gradients.NoiseScale(self.config.run.batch_gpu, batch)
        found = gradients.NoiseScale(self.rank_batch, batch)
        self.train_step.register_comm_hook(None, found.hook)
        return found

    # ---- restore

    def restore(self, state: dict | None, path: str) -> None:
        """Continues from the content of a state file, which only rank 0 needs to have; prints what was restored. Empties `state`.

        Raises UserError, and leaves the run unchanged, where the content does not fit the run."""
        found = {}
        distributed.from_rank0(lambda: found.update(schema.checked(state, self, path)))
        part = lambda name: distributed.share(found.pop(name, None), what='reading the state')
        self.sharding.restore(found, self.net, self.averages, self.optimizer, path)
        if self.net.model.channels_last:
            match_layout(self.optimizer)
        self.objective.load_state_dict(part('objective'))
        self.stats.restore(part('stats') or [])
        progress = part('progress')
        self.progress = EasyDict({'tick_nimg': progress['nimg'], 'pending': [], **progress})
        if from_json(part('options')).run.precision == 'fp16':  # a factor that another precision never changed says nothing about fp16
            self.scale.restore(self.progress.loss_scale)
        self.data.stream.restore(self.progress.stream)
        if distributed.rank() == 0:
            state.clear()  # releases the file
            self.folder.rewind_log(self.progress.log_bytes)
        self._start_clock()
        distributed.print0(f'Restored network, EMA, optimizer, objective and data position from {path} ({self.progress.nimg / 1e3:g} kimg)')

    # ---- step

    def step(self) -> None:
        """One update on one global batch. Nothing here waits for the device."""
        p, run = self.progress, self.config.run
        host, due = self.data.feed.next(), self.objective.due(p.step)
        rounds = -(-self.rank_batch // run.batch_gpu)
        if self.compiled is not None:
            self.compiling += self.compiled.prepare(p.step, lambda: self._parts(host), self._backward, self.scale.value)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for module in self.beginners:
                module.begin_step()
        for i, part in enumerate(self._parts(host)):
            outcome = self._backward(*part, due, i, last=i == rounds - 1)
            if i == 0 and self.noise_scale is not None and distributed.size() == 1:
                share = self.rank_batch / run.batch_gpu  # makes it the gradient of the micro-batch's own mean
                self.noise_scale.note_part([p.grad for p in self.params if p.grad is not None], share)
            self._report_terms(outcome)
        self.objective.timesteps.update()
        self._update()
        p.nimg += run.batch
        p.step += 1
        p.stream = host.stream_state

    def _parts(self, host):
        """The micro-batches of a HostBatch on the device, each with its Draws."""
        draws_of = lambda row: misc.Draws(self.config.run.seed, self.progress.step, self.first_row + row, self.device)
        return micro_batches(host, self.config.run.batch_gpu, self.device, draws_of, self.net.label_dim, self.net.img_channels)

    def _backward(self, batch, draws, due, number=0, last=False) -> Outcome:
        """Adds the gradients of a micro-batch, the last one or another of this step."""
        run, step = self.config.run, self.progress.step
        self.row_draws.begin(draws, len(batch.images))
        # seeded: for layers that do not use row_draws, such as nn.Dropout in other people's networks.
        with self._sync(last), misc.seeded(run.seed, step, 'dropout', distributed.rank(), number, device=self.device):
            with self.compiled.watch(step) if self.compiled else contextlib.nullcontext():
                outcome = self.train_step(batch, draws, self.scale.value, due)
            outcome.loss.backward()
        return outcome

    def _sync(self, last):
        """Context in which gradients are summed over the ranks only once per step, with the last micro-batch."""
        ddp = isinstance(self.train_step, torch.nn.parallel.DistributedDataParallel)
        return self.train_step.no_sync() if ddp and not last else contextlib.nullcontext()

    def _update(self):
        """Learning rate, Adam, EMA. A non-finite gradient skips the update on the device (found_inf), and is counted."""
        p, batch, clip = self.progress, self.config.run.batch, self.config.optimizer.clip
        for group in self.optimizer.param_groups:
            group['lr'] = self.learning_rate(p.nimg, batch) * group.get('factor', 1)
        for param in self.objective.resting(self.net, p.step):
            param.grad = None  # a gradient of 0 would let the optimizer's momentum move it
        grads = self.sharding.gradients(self.params)
        factor = 1 / self.scale.value
        if self.scale.dynamic or self.config.optimizer.loss_scale != 1:
            torch._foreach_mul_(grads, factor)
        norm = self.sharding.norm(grads)
        bad = self.guard.note_update(norm)
        if self.noise_scale is not None:
            signal, spread = self.noise_scale.estimates(norm / factor)
            self.stats.report('GNS/signal', signal * factor.square())
            self.stats.report('GNS/spread', spread * factor.square())
        if clip:
            gradients.clip(grads, norm, clip)
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        self.optimizer.step()
        self.scale.update(bad)
        for average in self.averages.values():
            average.update(self.net, p.nimg, batch)
        self._report_step('Grad/norm', norm)
        self._report_step('Grad/skipped', bad)

    def _report_step(self, name, value):
        """Reports a number of the whole step, known to all ranks, only once, so that a mean is over steps on any number of ranks."""
        self.stats.report(name, value if distributed.rank() == 0 else value.new_zeros(0))

    def _report_terms(self, outcome):
        """Reports each term by its name, separately for clean and noisy rows, and by quartile of p(sigma). Sums over C, H, W."""
        self.objective.timesteps.note(*outcome.noted)
        for name, (moments, bad) in outcome.reports.items():
            self.guard.note(name, bad)
            self.stats.add_groups(f'Loss/{name}', moments, outcome.group, GROUPS)

    def stop_if_spoiled(self) -> None:
        """Ends a run after too many skipped updates: saves the state, and says where the non-finite values come from."""
        if not self.guard.must_stop(self.progress.step):
            return
        lines = [f'rank {rank}, term {term}, {line}' for rank, found in enumerate(distributed.all_values(self.guard.culprits()))
                 for term, line in found.items()]
        self.save_state()
        self.finish_states()
        where = f'the last non-finite losses: {"; ".join(lines[:8])}' if lines else 'all losses were finite'
        raise UserError(
            f'{int(self.guard.in_row)} updates in a row were skipped because of non-finite gradients, up to step {self.progress.step}; '
            f'{where}. The weights before them are saved; start a new run from that state with --transfer and a lower --lr, with --clip, '
            'or with --precision=bf16 or fp32')

    # ---- report

    def _start_clock(self):
        """Starts the tick's clock; in a continued run it covers only the part after the restart."""
        self.clock_nimg, self.clock, self.compiling = self.progress.nimg, time.time(), 0.0

    def rate(self) -> float:
        """Images per second since the clock was started, without the time of compilation."""
        return (self.progress.nimg - self.clock_nimg) / max(time.time() - self.clock - self.compiling, 1e-9)

    def seconds(self) -> float:
        """Training time of the whole run, in seconds, including earlier processes."""
        return self.progress.seconds + time.time() - self.clock

    def report(self) -> None:
        """Gathers the statistics of a tick, writes one line to stats.jsonl and one to the console. Synchronises once."""
        p = self.progress
        stats = self.stats.flush()
        rate, seconds = self.rate(), self.seconds()
        fields = {'nimg': p.nimg, 'Progress/kimg': p.nimg / 1e3, 'Progress/tick': p.tick, 'Progress/step': p.step,
                  **{name: s['mean'] for name, s in stats.items() if s['mean'] is not None},
                  'Pairs/passed': p.stream['cursor'], 'Pairs/accepted': p.stream['used'] / p.stream['cursor'],
                  'Optimizer/lr': self.optimizer.param_groups[0]['lr'],
                  'Timing/seconds': round(seconds, 3), 'Timing/img_per_sec': round(rate, 2)}
        if self.noise_scale is not None:
            spread, signal = (stats[f'GNS/{name}']['mean'] for name in ('spread', 'signal'))
            fields['GNS/batch'] = spread / signal if signal else None  # None: no finite gradient in this tick
        if self.scale.dynamic:
            fields['Grad/loss_scale'] = self.scale.state()[0]
        fields |= {f'Resources/{k}': v for k, v in memory_gib(self.device).items()}
        if distributed.rank() == 0:
            self.folder.log(finite(fields))
            self.mirrors.scalars(fields, p.nimg)
        left = max(self.config.run.duration_kimg * 1e3 - p.nimg, 0) / max(rate, 1e-9)
        shown = SHOWN.format(first=self.objective.first.name)
        losses = '  '.join(f'{name.removeprefix("Loss/")} {s["mean"]:.5g}' for name, s in stats.items()
                           if re.fullmatch(shown, name) and s['mean'] is not None)
        skipped = round(stats['Grad/skipped']['mean'] * stats['Grad/skipped']['num'])
        warning = f'  SKIPPED {skipped} updates (non-finite gradients)' if skipped else ''
        distributed.print0(f'tick {p.tick}  kimg {p.nimg / 1e3:.3f}  time {format_time(seconds)}  {losses}  img/s {rate:.1f}  '
                           f'eta {format_time(left)}  mem {fields["Resources/cpu_gib"]:.2f} GiB{warning}')

    def _log(self, fields):
        """Writes another line to stats.jsonl, in addition to that of the tick."""
        if distributed.rank() == 0:
            self.folder.log({'nimg': self.progress.nimg, **fields})
            self.mirrors.scalars(fields, self.progress.nimg)

    # ---- ends of ticks

    def end_tick(self, done: bool) -> None:
        """Reports, and notes what else is due; done: whether the training is finished."""
        p, run = self.progress, self.config.run
        p.tick += 1
        self.report()
        due = lambda every: bool(every and (done or p.tick % every == 0))
        wanted = dict(validate=self.data.validation is not None and due(run.snapshot_ticks), snapshot=due(run.snapshot_ticks),
                      measure=run.metrics is not None and due(run.metrics.every), state=due(run.state_ticks))
        p.pending = [name for name, is_due in wanted.items() if is_due or name in self.missed]
        p.seconds, p.tick_nimg = self.seconds(), p.nimg
        self.missed.clear()
        self._start_clock()

    def do_pending(self) -> None:
        """Does what is due, in order. Where Stop is raised meanwhile, what was cut short is left in progress.pending and has nothing in
        the log: the continued run does it."""
        p = self.progress
        while p.pending:
            name, *rest = p.pending
            if name == 'state':
                p.pending = rest
                self.save_state()
            else:
                getattr(self, name)()
                p.pending = rest
        p.seconds = self.seconds()
        self._start_clock()

    def validate(self) -> None:
        """Held-out loss of the EMA into stats.jsonl."""
        fields = self.data.validation(self.sharding.whole(self.ema).module, self.objective.first, self.device, stop=self.requests.asked)
        self.requests.now()
        self._log(fields)
        means = '  '.join(f'{name} {fields[name]:.5g}' for name in ('Val/clean', 'Val/noisy') if fields.get(name) is not None)
        distributed.print0(f'    held out: {means}  of {fields["Val/num_images"]} images')

    def measure(self) -> None:
        """Writes metrics of samples of the EMA to stats.jsonl."""
        net = self.sharding.whole(self.ema).module
        fields = self.metrics(net, stop=self.requests.asked, labels=self.data.labels, **sampling.default_pieces(net))
        self.requests.now()
        if fields:
            self._log(fields)
            shown = '  '.join(f'{name.removeprefix("Metrics/")} {value:.5g}' for name, value in fields.items() if value is not None)
            distributed.print0(f'    metrics: {shown}')

    def snapshot(self) -> None:
        """Writes the EMA's network folder and a sample grid; if that fails, it is tried again at the next tick."""
        found, averages = {}, self.sharding.for_snapshot(self.averages)
        failed = distributed.share(distributed.rank() == 0 and not self._save_snapshot(averages, found), what='writing the snapshot')
        self.requests.now()
        if found:
            self._log(found)
        if failed:
            self.missed.add('snapshot')

    def _save_snapshot(self, averages, found):
        """False where it cannot be written. Non-finite weights are not saved, and the training continues. found: gets what the alarms
        measure."""
        stop_if_orphan()
        kimg = self.progress.nimg / 1e3
        for name, words in alarms.broken(averages).items():
            print(f'Warning: no snapshot is written at kimg {kimg:.3f}: the average "{name}" is not finite in {words}', flush=True)
            return True
        path, net = self.folder.numbered('network-snapshot', kimg), averages['halflife'].module
        try:
            save_network(net, path, card=model_card(net.config, to_json(self.config), kimg))
            for average in list(averages.values())[1:]:
                path = self.folder.numbered('ema-snapshot', kimg, f'-{average.sigma_rel:.3f}.safetensors')
                posthoc.write_average(path, average, self.progress.nimg)
            if self.config.run.samples:
                path = self.folder.numbered('samples', kimg, '.png')
                drawn = sample_grid(net, self.config.run.samples, path, stop=self.requests.asked, output=self.output,
                                    labels=self.data.labels, **sampling.default_pieces(net))
                if drawn is not None:
                    self.mirrors.picture(path, self.progress.nimg)
                    self.alarms.look(drawn, found)
        except OSError as err:
            cannot_write(path, err, 'and it is tried again at the next tick')
            return False
        return True

    # ---- states

    def state(self) -> dict | None:
        """Everything needed to continue, on rank 0; None on the others, which contribute their part. Copies only what --shard divides."""
        stats = distributed.all_values(self.stats.state(), what='writing the state')
        weights = self.sharding.state(self.net, self.averages, self.optimizer)
        if distributed.rank() != 0:
            return None
        p = self.progress
        progress = dict(p, pending=list(p.pending), seconds=self.seconds(), log_bytes=self.folder.log_bytes, loss_scale=self.scale.state())
        state = dict(options=to_json(self.config), progress=progress, **weights, objective=self.objective.state_dict())
        return state if p.nimg == p.tick_nimg else state | {'stats': stats}

    def save_state(self) -> None:
        """Copies the state to host memory, to be written while the training continues. All ranks call this."""
        self.states.wait()  # for the previous one: here the other ranks can wait as well
        state = self.state()
        self.requests.state_at, self.requests.retry_at = time.time(), None
        if state is None:
            return
        stop_if_orphan()
        path = self.folder.numbered('training-state', self.progress.nimg / 1e3, '.pt')
        try:
            self.folder.flush_log()  # because a state holds the length of the log
        except OSError as err:
            self.states.failed(path, err)
        else:
            self.states.write(path, self.sharding.copied(state))

    def look_at_states(self) -> None:
        """Reports where the last state could not be written, and schedules another attempt; does not wait for a state in progress."""
        found = None if self.states.busy else self.states.finish()
        if found:
            cannot_write(*found, f'earlier states are kept, and it is tried again in {RETRY_SEC} s')
            self.requests.retry_at = time.time() + RETRY_SEC

    def finish_states(self) -> None:
        """Waits until the last state is written. All ranks call this. Raises UserError on all of them where it cannot be written."""
        found = self.states.finish()
        failed = distributed.share(found and f'{found[0]} could not be written ({found[1].strerror or found[1]})', what='writing the state')
        if failed:
            raise UserError(f'{failed}; free disk space, and continue from the last saved state with --resume=latest')


def memory_gib(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB, and the peak on its GPU since the last call."""
    found = {'cpu_gib': round(psutil.Process(os.getpid()).memory_info().rss / 2**30, 3)}
    if device.type == 'cuda':
        found['gpu_peak_gib'] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
        torch.cuda.reset_peak_memory_stats(device)
    return found


def training_loop(config: Config, run_dir: str, device: torch.device, mirrors: Mirrors | None = None, state: dict | None = None,
                  state_path: str | None = None, requests: Requests | None = None) -> Run:
    """Trains until config.run.duration_kimg, in the folder run_dir; with a state_path it continues from `state`, which rank 0 has.

    Raises Stop, after saving the state, where `requests` ask the run to end. Returns the Run."""
    every = config.run
    folder = RunFolder(run_dir, fractional=every.tick_kimg % 1 != 0)
    run = Run(config, folder, device, mirrors, resuming=state_path is not None, requests=requests)
    distributed.print0(run.data.line)
    if state_path is not None:
        run.restore(state, state_path)
    elif distributed.rank() == 0:
        folder.rewind_log(0)  # lines of a run that ended before its first state
    if distributed.rank() == 0:
        folder.write_options(config)  # only here, where nothing is refused any more, may they replace those of a continued run
    distributed.print0(f'Training for {every.duration_kimg:g} kimg in {run_dir}')
    run.requests.begin()
    try:
        train(run, round(every.duration_kimg * 1e3), round(every.tick_kimg * 1e3))  # 0.24 * 1e3 is a little more than 240
        run.finish_states()
    except Stop:
        run.save_state()
        run.finish_states()
        raise
    finally:
        run.data.feed.close()
    distributed.barrier()
    return run


def train(run: Run, total_nimg: int, tick_nimg: int) -> None:
    """Runs steps and ticks up to total_nimg. Raises Stop where the run is asked to end."""
    p = run.progress
    run.do_pending()  # for the tick in which the run was stopped
    last_line = time.time()
    while True:
        # This comes first, because a state may have been written between the last step of a tick and its end.
        if p.nimg > p.tick_nimg and p.nimg >= min(total_nimg, p.tick_nimg + tick_nimg):
            run.end_tick(done=p.nimg >= total_nimg)
            run.do_pending()
            last_line = time.time()
        if p.nimg >= total_nimg:
            return
        stop_if_orphan()
        run.step()
        run.stop_if_spoiled()
        if time.time() - last_line > HEARTBEAT_SEC:
            left = format_time((total_nimg - p.nimg) / run.rate())
            distributed.print0(f'    step {p.step}  kimg {p.nimg / 1e3:.3f}  img/s {run.rate():.1f}  eta {left}')
            last_line = time.time()
        run.look_at_states()
        if run.requests.after_step():
            run.save_state()
