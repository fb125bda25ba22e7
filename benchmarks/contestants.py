# SPDX-License-Identifier: Apache-2.0
"""Who takes part in the benchmarks of speed: this program, diffusers and denoising-diffusion-pytorch, with networks of equal shape.

Each peer trains and samples as its own example or trainer does: diffusers' UNet2DModel with DDPMScheduler, mean squared error of the noise,
AdamW, clipping, a cosine learning rate and EMAModel (its example of unconditional training); denoising-diffusion-pytorch's Unet with the
loss of GaussianDiffusion, Adam, clipping and its EMA (its Trainer). Their images wait in memory, so that no loader holds them up."""

import contextlib
import functools
import importlib.util
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import train
from benchmarks import large_data, measure
from dnnlib import EasyDict, UserError
from torch_utils import misc, registry
from training.networks.interface import ARCHS
from training.networks.preconditioning import build_network
from training.run import presets, training_loop
from training.run.configure import configure
from training.run.folder import RunFolder

IMAGES = 1024  # random pictures of the data set
PEERS = ('diffusers', 'denoising-diffusion-pytorch')
DDP = 'denoising_diffusion_pytorch'
PUBLISHED = ['--precision=fp32', '--compile=0']  # settings of EDM's published program, with NCHW tensors


class Shape(NamedTuple):
    """Networks of equal shape and about equal parameters: side of the images, --arch and classes here, and the peers' arguments."""

    side: int
    arch: str
    classes: int = 0
    diffusers: dict | None = None  # block_out_channels, layers_per_block; attention at half of the side
    ddp: dict | None = None  # dim, dim_mults


SHAPES = {
    'small': Shape(16, 'ddpmpp:cbase=32,cres=1|2,blocks=1,attn=8', 0, dict(block_out_channels=(32, 64), layers_per_block=1),
                   dict(dim=32, dim_mults=(1, 2))),
    'medium': Shape(32, 'ddpmpp:cbase=64,blocks=2', 0, dict(block_out_channels=(128,) * 3, layers_per_block=2),
                    dict(dim=128, dim_mults=(1, 1, 1))),
    'cifar': Shape(32, 'ddpmpp', 0, dict(block_out_channels=(256,) * 3, layers_per_block=4), dict(dim=320, dim_mults=(1, 1, 1))),  # EDM's
    'ffhq': Shape(64, 'ddpmpp:cres=1|2|2|2'),  # EDM's
    'imagenet': Shape(64, 'adm', 1000),  # ADM, as EDM trains it
}


class Trainer(NamedTuple):
    """One contestant of the training step. flops: of one image, forward and backward. step(): one update on a batch of this size."""

    name: str
    parameters: int
    flops: int
    batch: int
    step: Callable[[], None]
    facts: dict  # precision, compile, layout
    close: Callable[[], None] = lambda: None


def network_config(shape: Shape) -> dict:
    """config.json of this program's network."""
    return registry.build(shape.arch, ARCHS, '--arch')() | {'img_resolution': shape.side, 'img_channels': 3, 'label_dim': shape.classes}


def inputs(config: dict, count: int = 1) -> tuple:
    """Images, levels and labels for a network with this config.json, on the device of the context."""
    height, width = misc.height_width(config['img_resolution'])
    labels = torch.zeros(count, config['label_dim']) if config.get('label_dim') else None
    return torch.zeros(count, config['img_channels'], height, width), torch.ones(count), labels


def count_network(config: dict) -> tuple[int, int, int]:
    """(parameters, FLOPs of an evaluation, FLOPs of forward and backward pass) of an image."""
    return _counted(json.dumps(config))


@functools.cache
def _counted(text):
    config = json.loads(text)
    return count_of(lambda: build_network(config), lambda net: net(*inputs(config)))


def count_of(make: Callable, call: Callable) -> tuple[int, int, int]:
    """(parameters, FLOPs of a call, FLOPs of the call and its backward pass) of a network that make() builds; nothing is computed."""
    found = []
    with torch.device('meta'), misc.seeded('shapes'):
        net = make()
        found.append(measure.count_flops(lambda: found.append(call(net))))
        found.append(measure.count_flops(lambda: found[0].square().mean().backward()))
    return sum(p.numel() for p in net.parameters()), found[1], found[1] + found[2]


def layout_of(net: torch.nn.Module) -> str:
    """Whether the kernels of the convolutions lie channels last ("nhwc") or not ("nchw")."""
    last = [p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in net.parameters() if p.ndim == 4]
    return 'nhwc' if any(last) else 'nchw'


def set_layout(net: torch.nn.Module, layout: str | None) -> None:
    """Puts the weights of a network of this program channels last ("nhwc") or not ("nchw"); None leaves them."""
    if layout in (None, layout_of(net)):
        return
    net.model.set_channels_last(layout == 'nhwc')


# ---- this program


@contextlib.contextmanager
def our_trainer(name: str, shape: Shape, batch: int, device: torch.device, flags: list[str],
                layout: str | None = None) -> Iterator[Trainer]:
    """train.py's own step on 90 % noisy images. flags: its options; layout: see set_layout()."""
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, 'data')
        large_data.make(data, IMAGES, shape.side, shape.classes or 1)
        context = train.main.make_context('train', [
            f'--data={data}', f'--outdir={folder}', '--nosubdir', f'--arch={shape.arch}', f'--cond={int(shape.classes > 0)}', '--seed=0',
            f'--batch={batch}', '--sigma=0.2', '--corruption-probability=0.9', *flags])
        config = configure(EasyDict(context.params, command=presets.given(context)))
        run = training_loop.Run(config, RunFolder(folder, fractional=True), device)
        set_layout(run.net, layout)
        parameters, _, flops = count_network(config.network.arguments)
        facts = {'precision': config.run.precision, 'compile': bool(config.run.compile), 'layout': layout_of(run.net)}
        try:
            yield Trainer(name, parameters, flops, batch, run.step, facts, run.data.feed.close)
        finally:
            run.data.feed.close()


# ---- the peers


def missing() -> list[str]:
    """A line for each peer that is not installed."""
    return [f'{name} is not installed and does not take part: pip install {name}' for name in PEERS
            if not importlib.util.find_spec(name.replace('-', '_'))]


@contextlib.contextmanager
def stand_ins(*names: str) -> Iterator[None]:
    """Empty modules of these names, where they cannot be imported: denoising-diffusion-pytorch imports torchvision for the data sets of
    its Trainer alone, and a torchvision of another build of torch cannot be imported."""
    made = []
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError):
            for stale in [key for key in sys.modules if key == name or key.startswith(f'{name}.')]:
                del sys.modules[stale]
            sys.modules[name] = types.ModuleType(name)
            made.append(name)
            parent, _, child = name.rpartition('.')
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)


def diffusers_network(shape: Shape) -> torch.nn.Module:
    """UNet2DModel with attention at half of the side."""
    from diffusers import UNet2DModel
    channels = shape.diffusers['block_out_channels']
    kinds = ['Attn' if level == 1 else '' for level in range(len(channels))]
    return UNet2DModel(sample_size=shape.side, in_channels=3, out_channels=3, **shape.diffusers,
                       down_block_types=tuple(f'{kind}DownBlock2D' for kind in kinds),
                       up_block_types=tuple(f'{kind}UpBlock2D' for kind in reversed(kinds)))


def ddp_library() -> Any:
    """The package denoising_diffusion_pytorch, without the progress bars of its samplers."""
    with stand_ins('torchvision', 'torchvision.transforms', 'torchvision.utils'):
        import denoising_diffusion_pytorch
        from denoising_diffusion_pytorch import denoising_diffusion_pytorch as inner
    inner.tqdm = lambda items, **options: items
    return denoising_diffusion_pytorch


def ddp_diffusion(shape: Shape, **options: Any) -> torch.nn.Module:
    """GaussianDiffusion of a Unet."""
    library = ddp_library()
    return library.GaussianDiffusion(library.Unet(**shape.ddp), image_size=shape.side, **options)


def pictures(shape: Shape, batch: int, device: torch.device) -> torch.Tensor:
    """A batch in host memory, [-1,1]; pinned for a GPU."""
    images = torch.rand(batch, 3, shape.side, shape.side, generator=misc.generator('pictures')) * 2 - 1
    return images.pin_memory() if device.type == 'cuda' else images


def half(precision: str, device: torch.device) -> Any:
    """Automatic mixed precision in bfloat16, or none for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16')


def diffusers_trainer(shape: Shape, batch: int, device: torch.device, precision: str = 'fp32', compile: bool = False) -> Trainer:
    """The step of diffusers' example of unconditional training, with its --use_ema."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    parameters, _, flops = count_of(lambda: diffusers_network(shape), lambda net: net(*inputs(network_config(shape))[:2]).sample)
    with misc.seeded('diffusers'):
        model = diffusers_network(shape).to(device).train()
    averaged = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule='linear')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_scheduler('cosine', optimizer=optimizer, num_warmup_steps=500, num_training_steps=100_000)
    images, draws = pictures(shape, batch, device), misc.generator('draws', device=device)
    called = torch.compile(model) if compile else model

    def step():
        clean = images.to(device, non_blocking=True)
        noise = torch.randn(clean.shape, generator=draws, device=device)
        times = torch.randint(0, 1000, [batch], generator=draws, device=device)
        noisy = scheduler.add_noise(clean, noise, times)
        with half(precision, device):
            found = called(noisy, times).sample
        torch.nn.functional.mse_loss(found.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        averaged.step(model.parameters())
    return Trainer('diffusers', parameters, flops, batch, step, {'precision': precision, 'compile': compile, 'layout': layout_of(model)})


def ddp_trainer(shape: Shape, batch: int, device: torch.device, precision: str = 'fp32', compile: bool = False) -> Trainer:
    """The step of denoising-diffusion-pytorch's Trainer."""
    library = ddp_library()
    from ema_pytorch import EMA
    parameters, _, flops = count_of(lambda: library.Unet(**shape.ddp), lambda net: net(*inputs(network_config(shape))[:2]))
    with misc.seeded('ddp'):
        diffusion = ddp_diffusion(shape).to(device).train()
    averaged = EMA(diffusion, beta=0.995, update_every=10).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    images = pictures(shape, batch, device) / 2 + 0.5
    if compile:
        diffusion.model.compile()

    def step():
        with half(precision, device):
            loss = diffusion(images.to(device, non_blocking=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averaged.update()
    facts = {'precision': precision, 'compile': compile, 'layout': layout_of(diffusion)}
    return Trainer('denoising-diffusion-pytorch', parameters, flops, batch, step, facts)


def peer_trainers(shape: Shape, batch: int, device: torch.device, precision: str = 'fp32', compile: bool = False) -> list[Trainer]:
    """The peers that are installed and have a network of this shape."""
    return _installed(shape, {'diffusers': diffusers_trainer, DDP: ddp_trainer}, shape, batch, device, precision, compile)


# ---- the peers' samplers


class Sampler(NamedTuple):
    """A peer's sampler. flops: of one evaluation of one image. sample(count, evaluations) -> uint8 [N,H,W,3], with so many for each."""

    name: str
    flops: int
    net: torch.nn.Module
    sample: Callable


def diffusers_sampler(shape: Shape, device: torch.device, precision: str = 'fp32', compile: bool = False) -> Sampler:
    """DDIMPipeline of an untrained UNet2DModel."""
    from diffusers import DDIMPipeline, DDIMScheduler
    _, flops, _ = count_of(lambda: diffusers_network(shape), lambda net: net(*inputs(network_config(shape))[:2]).sample)
    with misc.seeded('diffusers'):
        model = diffusers_network(shape).to(device).eval()
    if compile:
        model.compile()
    pipeline = DDIMPipeline(model, DDIMScheduler(num_train_timesteps=1000, beta_schedule='linear'))
    pipeline.set_progress_bar_config(disable=True)
    draws = misc.generator('draws', device=device)

    def sample(count, evaluations):
        with half(precision, device):
            found = pipeline(batch_size=count, num_inference_steps=evaluations, generator=draws, output_type='np').images
        return (found * 255).round().astype('uint8')
    return Sampler('diffusers', flops, model, sample)


def ddp_sampler(shape: Shape, device: torch.device, precision: str = 'fp32', compile: bool = False) -> Sampler:
    """GaussianDiffusion.sample of an untrained Unet, by its DDIM sampler."""
    library = ddp_library()
    _, flops, _ = count_of(lambda: library.Unet(**shape.ddp), lambda net: net(*inputs(network_config(shape))[:2]))
    with misc.seeded('ddp'):
        diffusion = ddp_diffusion(shape).to(device).eval()
    if compile:
        diffusion.model.compile()

    def sample(count, evaluations):
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = evaluations, True
        with half(precision, device):
            found = diffusion.sample(batch_size=count)
        return found.float().mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return Sampler('denoising-diffusion-pytorch', flops, diffusion.model, sample)


def peer_samplers(shape: Shape, device: torch.device, precision: str = 'fp32', compile: bool = False) -> list[Sampler]:
    """The samplers of the peers that are installed and have a network of this shape."""
    return _installed(shape, {'diffusers': diffusers_sampler, DDP: ddp_sampler}, shape, device, precision, compile)


def _installed(shape, makers, *arguments):
    """What makers {module: function} make of the arguments, of the modules that are installed and have a network of the shape."""
    found = []
    for module, make in makers.items():
        if getattr(shape, 'diffusers' if module == 'diffusers' else 'ddp') and importlib.util.find_spec(module):
            try:
                found.append(make(*arguments))
            except ImportError as err:
                raise UserError(f'{module}: {err}; install what it needs, or leave the peers out') from None
    return found
