# SPDX-License-Identifier: Apache-2.0
"""The part of a training step from a micro-batch on the device to the loss, on which backward() is called; and its compilation."""

import contextlib
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from dnnlib import UserError
from torch_utils import distributed, misc, training_stats
from training.data.batches import Batch
from training.run import gradients

GROUPS = [f'{kind}/q{quartile}' for kind in ('clean', 'noisy') for quartile in (1, 2, 3, 4)]  # losses are reported by these
AHEAD = 1000  # steps whose choices of terms are compiled before the first one


class Outcome(NamedTuple):
    """What a TrainStep returns; all but the loss are without gradients."""

    loss: torch.Tensor  # 0-dim, times the loss scale, over the number of images of this rank
    terms: dict  # {name: [N]}, as they were summed
    group: torch.Tensor  # int64 [N]: index into GROUPS
    reports: dict  # {name: (training_stats.moments, gradients.bad_rows)}
    noted: tuple  # for the timesteps' note()


class TrainStep(torch.nn.Module):
    """The module that torch.compile and DistributedDataParallel wrap: augmentation, levels, network, terms, and what is reported of them.

    It changes nothing: what it finds is returned, and added up outside, so that a compiled graph is a function of its inputs.
    augment: an AugmentPipe or None. quartiles: float32 [3], of p(sigma). images: of this rank in a step."""

    def __init__(self, net: torch.nn.Module, objective: torch.nn.Module, augment: Callable | None, quartiles: torch.Tensor,
                 images: int) -> None:
        super().__init__()
        self.net, self.objective, self.augment, self.images = net, objective, augment, images
        self.register_buffer('quartiles', quartiles, persistent=False)

    def forward(self, batch: Batch, randn: Callable, scale: torch.Tensor, due: tuple[str, ...]) -> Outcome:
        """randn: misc.Draws of the micro-batch. scale: the loss scale, 0-dim. due: the terms of this step, as Objective.due() says."""
        if self.augment is not None:
            images, augment_labels = self.augment(batch.images, batch.sigma_n, randn)
            batch = batch._replace(images=images, augment_labels=augment_labels)
        batch = self.objective.redraw(batch, randn, due)
        terms, noted = self.objective.timesteps.weigh(self.objective.values(self.net, batch, randn, due), batch)
        loss = sum(term.sum() for term in terms.values()) * (scale / self.images)
        group = torch.bucketize(batch.sigma.flatten(), self.quartiles) + 4 * (batch.sigma_n.flatten() > 0)
        terms = {name: values.detach() for name, values in terms.items()}
        reports = {name: (training_stats.moments(values), gradients.bad_rows(values, batch, randn.now)) for name, values in terms.items()}
        return Outcome(loss, terms, group, reports, noted)

    def choices(self, step: int) -> list[tuple[str, ...]]:
        """The choices of terms in this step and the next ones."""
        return list(dict.fromkeys(self.objective.due(step + k) for k in range(AHEAD)))


class CompiledStep:
    """Compiles a TrainStep, in place: one graph for each choice of terms and size of micro-batch, all of them before they are used, so that
    the time is told apart from that of training. A step that cannot be one graph is compiled in parts, or not at all, and a line says so.

    micro: largest number of images in a micro-batch. options: of torch.compile."""

    MODES = {'as one graph': {'fullgraph': True}, 'in parts': {'fullgraph': False}, 'not': None}

    def __init__(self, step: TrainStep, micro: int, **options: Any) -> None:
        self.step, self.options = step, {'dynamic': False, **options}
        self.sizes = sorted({min(micro, step.images), step.images % micro or micro})  # the last micro-batch may be smaller
        self._ready, self._told, self._modes = set(), False, iter(self.MODES.items())
        # With one graph all gradients are ready together; cut at DistributedDataParallel's buckets it would be several.
        _dynamo().config.optimize_ddp = False
        self._next_mode()

    def _next_mode(self):
        self.mode, options = next(self._modes)
        self.step._compiled_call_impl = None  # what Module.compile() sets
        if options is not None:
            self.step.compile(**options, **self.options)

    def prepare(self, at: int, parts: Callable, backward: Callable, scale: torch.Tensor) -> float:
        """Compiles what the steps from number `at` on need and is not there yet; prints a line, and returns the seconds that it took.

        It rehearses the step, which leaves nothing behind but gradients. parts() -> the micro-batches (batch, draws) of the step.
        backward(batch, draws, due): calls the TrainStep, and adds the gradients. scale: the loss scale."""
        missing = [(size, due) for due in self.step.choices(at) for size in self.sizes if (size, due) not in self._ready]
        if not missing:
            return 0.0
        samples = {}
        for part in parts():
            samples.setdefault(len(part[0].images), part)
        start, before = time.time(), graphs()
        self._ready |= set(missing)
        config = _dynamo().config
        config.recompile_limit = max(config.recompile_limit, len(self._ready) + 8)
        distributed.print0('Compiling the training step ... ', end='')
        told, self._told = self._told, True
        for size, due in missing:
            # Without the compiler first: what pieces make once and keep, such as tables on the device, would be made in every graph.
            with torch.no_grad(), misc.seeded('rehearsal', device=scale.device), torch.compiler.set_stance('force_eager'):
                self.step.forward(*samples[size], scale, due)
            self._compile(lambda part=samples[size], due=due: backward(*part, due))
        self._told = told
        took, count = time.time() - start, graphs() - before
        distributed.print0(f'done in {took:.0f} s ({count} graph{"s" * (count != 1)})')
        return took

    def _compile(self, rehearse):
        """Rehearses, and where that fails in the compiler, in the next mode."""
        while True:
            try:
                return rehearse()
            except _dynamo().exc.TorchDynamoException as err:
                if self.mode == 'not':
                    raise
                words, why = self.mode, ' '.join(str(err).split())[:200]
                self._next_mode()
                distributed.print0(f'\nWarning: the training step cannot be compiled {words}, and is compiled {self.mode}: {why}')

    @contextlib.contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Context of a call of the TrainStep in step number `step`: warns, once, where it is compiled again."""
        before = graphs()
        try:
            yield
        except _dynamo().exc.FailOnRecompileLimitHit:
            raise UserError(f'--compile=1: the training step is compiled again and again, at step {step} once too often; a network or term '
                            'of your own depends on a number that changes (see docs/extending.md). Use --compile=0') from None
        if graphs() > before and not self._told:
            self._told = True
            distributed.print0(f'Warning: the training step was compiled again at step {step}, which takes time; TORCH_LOGS=recompiles in '
                               'the environment says why')


def data_parallel(step: TrainStep, device: torch.device) -> torch.nn.Module:
    """The TrainStep in DistributedDataParallel, which averages its gradients over the ranks."""
    ddp = torch.nn.parallel.DistributedDataParallel
    # Buffers are constants. PyTorch 2.13 renamed the argument.
    switch = 'forward_sync_buffers' if 'forward_sync_buffers' in inspect.signature(ddp).parameters else 'broadcast_buffers'
    warnings.filterwarnings('ignore', 'Grad strides do not match')  # 1x1 kernels have several equivalent layouts
    # Gradients that are views of its buckets need no copy, and no memory of their own.
    return ddp(step, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True, **{switch: False})


def graphs() -> int:
    """How many graphs this process has compiled."""
    return _dynamo().utils.counters['stats']['unique_graphs']


def _dynamo():
    """torch._dynamo, imported where it is needed, because that takes a second."""
    import torch._dynamo
    return torch._dynamo
