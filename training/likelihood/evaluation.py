# SPDX-License-Identifier: Apache-2.0
"""The work of eval_nll.py: evaluates images with a method, over all ranks, and writes the numbers with everything they depend on."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import dnnlib
from dnnlib import EasyDict, UserError, text_record
from dnnlib.files import beside, file_digest, prepare_output, write_json
from dnnlib.progress import Progress
from torch_utils import distributed, misc, numerics
from training.checkpoints.load import check_denoiser, load_network
from training.data.dataset import ImageDataset
from training.diffusion import discrete
from training.likelihood import dequantisation
from training.likelihood.bound import variational_bound, write_picture
from training.likelihood.flow import log_likelihood

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5  # EDM's values, the defaults
DIFFUSION = 'cosine:steps=1000'
BAR = '{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]'  # the bound counts fractions of images


def run(o: EasyDict) -> None:
    """Reads, measures, prints, and writes the files."""
    if o.threads:
        torch.set_num_threads(o.threads)
    distributed.init()
    numerics.set_numerics()
    out_path = o.out_path or beside(o.network, f'.{o.method}{"-gaussian" if o.dequantise == "gaussian" else ""}.json')
    for path, option, suffix in ((out_path, '--out-path', '.json'), (o.npz_path, '--npz-path', '.npz'), (o.plot, '--plot', '.png')):
        if path:
            prepare_output(path, option, suffix)
    net = load_network(o.network, device=distributed.pick_device(o.device), weights=o.weights)
    check_denoiser(net, f'--network={o.network}')
    net.compute_dtype = torch.float32  # in half precision the trace is lost in rounding
    dataset, conditional = open_data(net, o)
    items = choose_items(dataset, o)
    method = METHODS[o.method, o.dequantise](net, dataset, o)
    found, terms = measure(net, dataset, items, conditional, method, o)
    if distributed.rank() == 0:
        result = {**summary(found, dataset), **provenance(net, dataset, items, conditional, o), **method.facts()}
        arrays = {'raw_idx': dataset.raw_idx[items], **found, **method.tables(terms)}
        write(result, arrays, out_path, o)


class FlowMethod:
    """Probability-flow ODE of dequantised images: (images, raw_idx, repeat, class_labels, progress) -> ({name: [n]}, [0,0])."""

    columns, terms = ('bits_per_dim', 'evaluations'), (0, 0)

    def __init__(self, net: torch.nn.Module, dataset: ImageDataset, o: EasyDict) -> None:
        self.net, self.o, self.is_float = net, o, dataset.is_float
        scales = np.atleast_1d(dataset.units['scale'] if dataset.is_float else 127.5)  # of all channels, or of each
        self.offset = sum(map(math.log2, scales)) / len(scales)
        self.flow = self.pick_flow()

    def pick_flow(self) -> dict:
        """The options of log_likelihood."""
        return flow_options(self.net, self.o)

    def __call__(self, images: torch.Tensor, raw_idx: np.ndarray, repeat: int, class_labels: torch.Tensor | None,
                 progress: Callable) -> tuple[dict, torch.Tensor]:
        if not self.is_float:
            images = dequantised(images, raw_idx, self.o.seed, repeat)
        found = log_likelihood(self.net, images, probes=self.probes(images, raw_idx, repeat), class_labels=class_labels,
                               progress=progress, **self.flow)
        bits = -found.log_p / (images[0].numel() * math.log(2)) + self.offset
        return {'bits_per_dim': bits, 'evaluations': found.evaluations}, torch.zeros(self.terms)

    def probes(self, images: torch.Tensor, raw_idx: np.ndarray, repeat: int) -> torch.Tensor | None:
        """Probes for the trace, [n,K,C,H,W]; None where it is exact."""
        if self.o.trace == 'exact':
            return None
        draw = lambda source: torch.randint(2, [self.o.probes, *images.shape[1:]], generator=source, dtype=torch.int8) * 2 - 1
        return keyed(draw, raw_idx, self.o.seed, 'probes', repeat).to(images.device)

    def facts(self) -> dict:
        """What the result tells of the method."""
        return {'method': 'probability-flow ODE, Dormand-Prince 5(4)',
                'dequantisation': 'none' if self.is_float else '(u + U[0,1) - 1/2) / 127.5 - 1', 'offset_bits': self.offset,
                'prior_variance': self.flow['sigma_max'] ** 2 + self.flow['sigma_data'] ** 2, 'flow': self.flow}

    def tables(self, terms: np.ndarray) -> dict:
        """No arrays besides those per image."""
        return {}


class GaussianFlowMethod(FlowMethod):
    """Probability-flow ODE above the lowest level of the bound's diffusion, with the bound's decoder: a bound for grey levels."""

    columns = 'bits_per_dim', 'flow_bits_per_dim', 'decoder_bits_per_dim', 'noise_bits_per_dim', 'evaluations'

    def __init__(self, net: torch.nn.Module, dataset: ImageDataset, o: EasyDict) -> None:
        if dataset.is_float:
            raise UserError(f'--dequantise=gaussian is for 8-bit images, and --data={o.data} holds others, which need no '
                            'dequantisation; leave it out')
        self.diffusion, self.variance = pick_diffusion(net, o), pick_variance(net, o)
        super().__init__(net, dataset, o)

    def pick_flow(self) -> dict:
        """The options of log_likelihood, with the lowest level of the diffusion."""
        low = float(self.diffusion.levels[0])
        if low < self.net.sigma_min * (1 - 1e-5):  # networks keep levels in float32
            raise UserError(f'--diffusion={self.o.diffusion or DIFFUSION}: its lowest level, {low:.4g}, is not in the range of the '
                            f'network, {self.net.sigma_min:g} to {self.net.sigma_max:g}; a schedule of fewer steps starts higher')
        return flow_options(self.net, dnnlib.EasyDict(self.o, sigma_min=max(low, self.net.sigma_min))) | {'sigma_min': low}

    def __call__(self, images: torch.Tensor, raw_idx: np.ndarray, repeat: int, class_labels: torch.Tensor | None,
                 progress: Callable) -> tuple[dict, torch.Tensor]:
        noise = bound_noise(images, raw_idx, self.o.seed, repeat, 0)  # so that the decoder's term equals that of the bound
        options = {key: value for key, value in self.flow.items() if key != 'sigma_min'}
        found = dequantisation.grey_levels(self.net, self.diffusion, images, noise, class_labels=class_labels, variance=self.variance,
                                           probes=self.probes(images, raw_idx, repeat), progress=progress, **options)
        return dict(zip(self.columns, found)), torch.zeros(self.terms)

    def facts(self) -> dict:
        """What the result tells of the method."""
        return {**super().facts(), 'dequantisation': 'x_0 + sigma_1 N(0, 1), decoder of the bound', 'offset_bits': 0.0,
                'sigma_1': float(self.diffusion.levels[0]), 'steps': self.diffusion.steps,
                'trained_steps': self.diffusion.trained_steps, 'variance': self.variance}


class BoundMethod:
    """The variational bound of grey levels: (images, raw_idx, repeat, class_labels, progress) -> ({name: [n]}, sums [3,T])."""

    columns = ('bits_per_dim', 'prior_bits_per_dim', 'decoder_bits_per_dim', 'x0_mse', 'eps_mse')

    def __init__(self, net: torch.nn.Module, dataset: ImageDataset, o: EasyDict) -> None:
        if dataset.is_float:
            raise UserError(f'--method=vlb is a bound for 8-bit images, and --data={o.data} holds others; use --method=ode')
        self.net, self.o = net, o
        self.diffusion, self.variance = pick_diffusion(net, o), pick_variance(net, o)
        self.terms = 3, self.diffusion.steps

    def __call__(self, images: torch.Tensor, raw_idx: np.ndarray, repeat: int, class_labels: torch.Tensor | None,
                 progress: Callable) -> tuple[dict, torch.Tensor]:
        noise = lambda t: bound_noise(images, raw_idx, self.o.seed, repeat, t)
        found = variational_bound(self.net, self.diffusion, images, noise, class_labels=class_labels, variance=self.variance,
                                  progress=progress)
        values = found.total, found.prior, found.vb[:, 0], found.x0_mse.mean(dim=1), found.eps_mse.mean(dim=1)
        return dict(zip(self.columns, values)), torch.stack([part.sum(dim=0).cpu() for part in found[2:]])

    def facts(self) -> dict:
        """What the result tells of the method."""
        return {'method': 'variational bound', 'steps': self.diffusion.steps, 'trained_steps': self.diffusion.trained_steps,
                'variance': self.variance, 'sigma_range': [float(self.diffusion.levels[0]), float(self.diffusion.levels[-1])]}

    def tables(self, terms: np.ndarray) -> dict:
        """The mean terms of each step [T], and the steps."""
        return {**{f'terms_{name}': part for name, part in zip(('vb', 'x0_mse', 'eps_mse'), terms)},
                'levels': self.diffusion.levels.numpy(), 'timesteps': self.diffusion.timesteps}


def pick_diffusion(net: torch.nn.Module, o: EasyDict) -> discrete.Diffusion:
    """The Diffusion whose levels the bound visits: that of the network, or the one asked for, respaced by --steps."""
    own = hasattr(net, 'own_diffusion')
    if own and o.diffusion:
        raise UserError(f'--diffusion={o.diffusion}: the network has levels of its own; leave the option out')
    diffusion = net.own_diffusion() if own else discrete.build_diffusion(o.diffusion or DIFFUSION)
    try:
        return diffusion.respace(o.steps) if o.steps else diffusion
    except ValueError as err:
        raise UserError(f'--steps={o.steps}: {err}') from None


def pick_variance(net: torch.nn.Module, o: EasyDict) -> str:
    """Of the bound's reverse steps: what --variance asks for; auto: learned where the network was trained to give it, else large."""
    if o.variance == 'learned' and not getattr(net, 'output_multiple', 1) > 1:
        raise UserError('--variance=learned: the network has no channels for the variance; choose large or small')
    trained = getattr(net, 'gives_variance', False)
    return ('learned' if trained else 'large') if o.variance == 'auto' else o.variance


def open_data(net: torch.nn.Module, o: EasyDict) -> tuple[ImageDataset, bool]:
    """(ImageDataset, whether the network is given its labels), of the network's shape and units."""
    conditional = bool(net.label_dim) if o.cond is None else o.cond
    if conditional and not net.label_dim:
        raise UserError('--cond=1: the network is unconditional and takes no labels; leave the option out')
    dataset = ImageDataset(o.data, use_labels=conditional)
    expected = [net.img_channels, *misc.height_width(net.img_resolution)]
    if list(dataset.image_shape) != expected:
        raise UserError(f'--data={o.data}: its images have the shape {list(dataset.image_shape)}, those of the network {expected} '
                        '[C,H,W]; convert them with dataset_tool.py')
    if dataset.latents and dataset.latents.distribution:
        raise UserError(f'--data={o.data}: holds distributions of latents, whose samples have no likelihood of their own; encode them with '
                        'dataset_tool.py encode --form=mean')
    if dataset.form.units != net.units:
        raise UserError(f'--data={o.data}: its units are {dataset.units or "8-bit"}, those of the network '
                        f'{net.units or "8-bit"}; convert it like the training data')
    if dataset.label_dim > net.label_dim or (conditional and dataset.classes is None and dataset.label_dim != net.label_dim):
        raise UserError(f'--data={o.data}: its labels have {dataset.label_dim} dimensions, those of the network '
                        f'{net.label_dim}; number the classes as in the training data, or use --cond=0')
    if conditional and (told := text_record.difference(getattr(net, 'text', None), dataset.text)):
        raise UserError(f'--data={o.data}: its labels are not those of the network: {told}')
    return dataset, conditional


def choose_items(dataset: ImageDataset, o: EasyDict) -> np.ndarray:
    """The items to evaluate, int64: the first --num of the clean ones."""
    clean = np.flatnonzero(dataset.native_sigma == 0)
    if not len(clean):
        raise UserError(f'--data={o.data}: all {len(dataset)} images are noisy ("sigmas" in dataset.json); the '
                        'likelihood is evaluated on clean images')
    if len(clean) < len(dataset):
        distributed.print0(f'{len(dataset) - len(clean)} of {len(dataset)} images are noisy and are left out')
    option = distributed.num_option()
    if o.num is not None and o.num > len(clean):
        raise UserError(f'{option}={o.num}: --data={o.data} holds only {len(clean)} clean images; use '
                        f'{option}={len(clean)} or less')
    return clean[:o.num]


def flow_options(net: torch.nn.Module, o: EasyDict) -> dict:
    """The levels and tolerances of log_likelihood; the range lies within the network's."""
    sigma_min = o.sigma_min or max(SIGMA_MIN, net.sigma_min)
    sigma_max = o.sigma_max or min(SIGMA_MAX, net.sigma_max)
    if not net.sigma_min <= sigma_min < sigma_max <= net.sigma_max:
        raise UserError(f'--sigma-min={sigma_min:g} --sigma-max={sigma_max:g}: the first must be smaller, and both within the range of '
                        f'the network, {net.sigma_min:g} to {net.sigma_max:g}')
    return dict(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=o.sigma_data or getattr(net, 'sigma_data', SIGMA_DATA),
                rtol=o.rtol, atol=o.atol, max_steps=o.max_steps)


def measure(net: torch.nn.Module, dataset: ImageDataset, items: np.ndarray, conditional: bool,
            method: FlowMethod | GaussianFlowMethod | BoundMethod, o: EasyDict) -> tuple[dict, np.ndarray]:
    """On every rank: ({column: [repeats, N]}, the mean of the method's terms over images and repeats)."""
    found = {name: torch.zeros([o.repeats, len(items)], dtype=torch.float64) for name in method.columns}
    terms = torch.zeros(method.terms, dtype=torch.float64)
    mine, error = np.arange(len(items))[distributed.rank()::distributed.size()], None
    with Progress(o.repeats * len(mine), 'rank 0' if distributed.size() > 1 else None, show=distributed.rank() == 0, smoothing=0,
                  bar_format=BAR) as bar:
        try:
            for repeat in range(o.repeats):
                for rows in (mine[first:first + o.batch] for first in range(0, len(mine), o.batch)):
                    images, labels = read_batch(net, dataset, items[rows], conditional, o)
                    part, sums = method(images, dataset.raw_idx[items[rows]], repeat, labels, bar.update)
                    terms += sums
                    for name, values in part.items():
                        found[name][repeat, rows] = values.cpu().double()
        except (ValueError, UserError) as err:
            error = getattr(err, 'message', f'--network={o.network}: {err}')
    errors = [message for message in distributed.all_values(error) if message]
    if errors:
        raise UserError(errors[0])
    gather = lambda values: distributed.all_sum(values.to(distributed.device())).cpu().numpy()
    return {name: gather(values) for name, values in found.items()}, gather(terms) / (o.repeats * len(items))


def read_batch(net: torch.nn.Module, dataset: ImageDataset, items: np.ndarray, conditional: bool,
               o: EasyDict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(images [n,C,H,W] float64 in network units, class_labels or None) of items, on the device."""
    device = distributed.pick_device(o.device)
    images = dataset.to_network(np.stack([dataset.decode(i) for i in dataset.raw_idx[items]])).double()
    if not conditional:
        return images.to(device), None
    labels = torch.zeros([len(items), net.label_dim])  # a split may lack the highest classes
    labels[:, :dataset.label_dim] = torch.from_numpy(dataset.labels(items))
    return images.to(device), labels.to(device)


def keyed(draw: Callable, raw_idx: np.ndarray, *key: Any) -> torch.Tensor:
    """draw(generator) of each image, stacked: depends on the key and on its index in the archive, not on the batch or the rank."""
    return torch.stack([draw(misc.generator(*key, i)) for i in raw_idx])


def dequantised(images: torch.Tensor, raw_idx: np.ndarray, seed: int, repeat: int) -> torch.Tensor:
    """Images in network units, dequantised with uniform noise."""
    draw = lambda source: torch.rand(images.shape[1:], generator=source, dtype=torch.float64)
    return dequantisation.uniform(images, keyed(draw, raw_idx, seed, 'dequantisation', repeat).to(images.device))


def bound_noise(images: torch.Tensor, raw_idx: np.ndarray, seed: int, repeat: int, t: int) -> torch.Tensor:
    """Standard normal noise of step t of the bound, of the shape of images."""
    draw = lambda source: torch.randn(images.shape[1:], generator=source, dtype=torch.float64)
    return keyed(draw, raw_idx, seed, 'bound', repeat, t).to(images.device)


def summary(found: dict, dataset: ImageDataset) -> dict:
    """The numbers of the result: means over images, their standard error, and the std of the means over repeats."""
    values = found['bits_per_dim']
    means, images = values.mean(axis=1), values.mean(axis=0)
    name = 'differential_bits_per_dim' if dataset.is_float else 'bits_per_dim'
    return {name: misc.as_float(values.mean()),
            'standard_error': misc.as_float(images.std(ddof=1) / math.sqrt(len(images))) if len(images) > 1 else None,
            'std_over_repeats': misc.as_float(means.std(ddof=1)) if len(means) > 1 else None,
            **{key: misc.as_float(column.mean()) for key, column in found.items() if key != 'bits_per_dim'}}


def provenance(net: torch.nn.Module, dataset: ImageDataset, items: np.ndarray, conditional: bool, o: EasyDict) -> dict:
    """What the numbers depend on, for every method."""
    return {
        'num_images': len(items),
        'found_images': len(dataset),
        'data': {'path': o.data, 'split': o.split, 'image_shape': list(dataset.image_shape),
                 'sha256': file_digest(o.data)},
        'network': {'ref': o.network, 'weights': o.weights, 'state_sha256': misc.state_digest(net), 'config': net.config},
        'conditional': conditional,
        'device': str(distributed.pick_device(o.device)),
        'ranks': distributed.size(),
        'versions': misc.versions(),
        'options': dict(o),
    }


def write(result: dict, arrays: dict, out_path: str, o: EasyDict) -> None:
    """Writes the files and prints the table."""
    write_json(out_path, result)
    if o.npz_path:
        with dnnlib.replacing(o.npz_path) as part, open(part, 'wb') as f:
            np.savez(f, **arrays)
    if o.plot:
        write_picture(o.plot, arrays['levels'], {name: arrays[f'terms_{name}'] for name in ('vb', 'x0_mse', 'eps_mse')})
    numbers = list(result)[:list(result).index('num_images')]
    what = ', '.join(filter(None, [o.data, o.split and f'split {o.split}', f'{result["num_images"]} images', f'seed {o.seed}']))
    rows = [(name, f'{result[name]:.4f}') for name in numbers if result[name] is not None]
    for name, text in [*rows, ('of', what), ('under', f'{o.network} ({o.weights})'), ('by', result['method'])]:
        print(f'{name:<26} {text}')
    print(f'written to {", ".join(filter(None, [out_path, o.npz_path, o.plot]))}')


METHODS = {('ode', 'uniform'): FlowMethod, ('ode', 'gaussian'): GaussianFlowMethod, ('vlb', 'uniform'): BoundMethod}
