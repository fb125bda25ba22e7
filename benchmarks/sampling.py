# SPDX-License-Identifier: Apache-2.0
"""Images per second of generation with writer threads, compared with a plain loop that saves each batch before the next.

python benchmarks/sampling.py [--device=cuda --arch=cifar --images=4096 --batch=512 --precision=bf16 --compile --peak-tflops=989]"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.files import write_json  # noqa: E402 (the folder above had to be found first)
from torch_utils import misc  # noqa: E402
from training.diffusion import schedules  # noqa: E402
from training.networks import preconditioning  # noqa: E402
from training.sampling.generate import generate_images, network_device, resolution  # noqa: E402
from training.sampling.pixels import to_uint8  # noqa: E402
from training.sampling.writers import Files, Writers  # noqa: E402

ARCHS = {
    'small': dict(img_resolution=16, img_channels=3, model_type='SongUNet', model_channels=32, channel_mult=[1, 2], num_blocks=1,
                  attn_resolutions=[8]),
    'cifar': dict(img_resolution=32, img_channels=3, model_type='SongUNet', model_channels=128, channel_mult=[2, 2, 2]),  # EDM's
}


def make_network(arch, device, precision, compile):
    """A network with random weights of unit gain, whose images look like noise, which PNG cannot compress."""
    with misc.seeded('weights to be overwritten'):
        net = preconditioning.build_network(ARCHS[arch])
    source = misc.generator('weights')
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=source) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    net = net.to(device).eval().requires_grad_(False)
    net.compute_dtype = misc.DTYPES[precision]
    if compile:
        net.model.compile(dynamic=False)
    return net


@torch.no_grad()
def plain_loop(net, count, batch, steps, outdir):
    """Draws, samples, converts and saves one batch after the other."""
    device, shape = network_device(net), [net.img_channels, *resolution(net)]
    levels = schedules.edm(steps).to(device)
    for first in range(0, count, batch):
        seeds = range(first, min(first + batch, count))
        sources = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        x = torch.stack([torch.randn(shape, generator=source, device=device) for source in sources]).double() * levels[0]
        for start, end in zip(levels[:-1], levels[1:]):
            slope = (x - net(x, start).double()) / start
            step = (end - start) * slope
            if end > 0:
                step = (end - start) * (slope + (x + step - net(x + step, end).double()) / end) / 2
            x = x + step
        pixels = (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        for seed, image in zip(seeds, pixels):
            Image.fromarray(image).save(os.path.join(outdir, f'{seed:06d}.png'))


def ours(net, count, batch, steps, outdir, threads=4):
    """generate_images, with writer threads, or writing each batch before the next one is sampled."""
    files = Files(outdir, 'png')
    parts = generate_images(net, range(count), num_steps=steps, batch=batch)
    pixels = ((part.seeds, to_uint8(part.images).cpu().numpy()) for part in parts)
    if not threads:
        for seeds, arrays in pixels:
            for seed, array in zip(seeds, arrays):
                files.write(seed, array)
        return
    with Writers(threads) as writers:
        for seeds, arrays in pixels:
            for seed, array in zip(seeds, arrays):
                writers.submit(files.write, seed, array)


def rates(arms, args):
    """{arm: images per second of each repeat}: the arms alternate, after one untimed batch each."""
    found = {name: [] for name in arms}
    for repeat in range(args.repeats + 1):
        for name, arm in arms.items():
            count = args.images if repeat else args.batch
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                arm(count, args.batch, args.steps, folder)
                seconds = time.perf_counter() - start
                assert len(os.listdir(folder)) == count
            if repeat:
                found[name].append(count / seconds)
    return found


def flops_per_image(net, steps):
    """Floating-point operations of matrix products and convolutions in all 2N - 1 network evaluations of one image."""
    x = torch.zeros([1, net.img_channels, *resolution(net)], device=network_device(net))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x, torch.tensor(1.0))
    return counter.get_total_flops() * (2 * steps - 1)


def machine(device):
    """What the numbers were measured on."""
    names = [line.split(':')[1].strip() for line in _lines('/proc/cpuinfo') if line.startswith('model name')]
    gpu = f'{torch.cuda.get_device_name(device)}, ' if device.type == 'cuda' else ''
    cpu = names[0] if names else platform.machine()
    return f'{gpu}{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}'


def _lines(path):
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--arch', choices=sorted(ARCHS), default='small')
    parser.add_argument('--images', type=int, default=96)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--steps', type=int, default=18)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--precision', choices=sorted(misc.DTYPES), default='fp32')
    parser.add_argument('--compile', action='store_true', help='compile the U-Net, for all arms')
    parser.add_argument('--peak-tflops', type=float, help='peak speed of the device at this precision, from its data sheet')
    parser.add_argument('--json', help='also write the numbers to this file')
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = torch.device(args.device)
    flops = flops_per_image(make_network(args.arch, device, 'fp32', False), args.steps)  # compiled calls are not counted
    net = make_network(args.arch, device, args.precision, args.compile)
    arms = {'plain loop, saves as it goes': lambda *work: plain_loop(net, *work),
            'generate_images, saves as it goes': lambda *work: ours(net, *work, threads=0),
            'generate_images, 4 writer threads': lambda *work: ours(net, *work)}
    print(f'{args.arch} network, {args.images} images, batch {args.batch}, {args.steps} Heun steps, {args.precision}'
          f'{", compiled" if args.compile else ""}; {machine(device)}')
    found = rates(arms, args)
    for name, values in found.items():
        rate = statistics.median(values)
        share = f'   {rate * flops / args.peak_tflops / 1e12:6.1%} of the limit' if args.peak_tflops else ''
        print(f'  {name:34} {rate:9,.1f} images/s  ({min(values):,.1f} to {max(values):,.1f}){share}')
    print(f'  {flops / 1e9:,.2f} GFLOP per image' + (f'; the limit at {args.peak_tflops:g} TFLOP/s is '
          f'{args.peak_tflops * 1e12 / flops:,.0f} images/s' if args.peak_tflops else ''))
    if args.json:
        facts = {'machine': machine(device), 'options': vars(args), 'flops_per_image': flops, 'images_per_second': found}
        write_json(args.json, facts)


if __name__ == '__main__':
    main()
