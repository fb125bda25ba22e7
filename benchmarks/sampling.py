# SPDX-License-Identifier: Apache-2.0
"""Images per second of generation with writer threads, compared with a plain loop that saves each batch before the next, and with peers.

python benchmarks/sampling.py [--peers] [--device=cuda --arch=cifar --images=4096 --batch=512 --precision=bf16 --compile]"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import contestants, measure  # noqa: E402 (the folder above had to be found first)
from benchmarks.contestants import SHAPES, Sampler  # noqa: E402
from torch_utils import misc  # noqa: E402
from training.diffusion import schedules  # noqa: E402
from training.networks import preconditioning  # noqa: E402
from training.sampling.generate import generate_images, network_device, resolution  # noqa: E402
from training.sampling.pieces import prepare_network  # noqa: E402
from training.sampling.pixels import to_uint8  # noqa: E402
from training.sampling.writers import Files, Writers  # noqa: E402

WRITERS = 4


def make_network(arch, device, precision, compile, layout=None):
    """A network with random weights of unit gain, whose images look like noise, which PNG cannot compress."""
    with misc.seeded('weights to be overwritten'):
        net = preconditioning.build_network(contestants.network_config(SHAPES[arch]))
    source = misc.generator('weights')
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=source) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    net = prepare_network(net.to(device).eval().requires_grad_(False), device, precision, compile)  # as generate.py does
    contestants.set_layout(net, layout)
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


def ours(net, count, batch, steps, outdir, threads=WRITERS):
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


def peer(sampler: Sampler, count, batch, steps, outdir):
    """A peer's sampler with as many evaluations of each image as `steps` Heun steps take, which saves as it goes."""
    for first in range(0, count, batch):
        pixels = sampler.sample(min(batch, count - first), 2 * steps - 1)
        for seed, image in enumerate(pixels, first):
            Image.fromarray(image).save(os.path.join(outdir, f'{seed:06d}.png'))


def rates(arms, args, device):
    """{arm: Spent of each repeat}: the arms alternate, after one untimed batch each."""
    def work(arm, count):
        with tempfile.TemporaryDirectory() as folder:
            arm(count, args.batch, args.steps, folder)
            assert len(os.listdir(folder)) == count
    for arm in arms.values():
        work(arm, args.batch)
    return measure.in_turns({name: lambda arm=arm: work(arm, args.images) for name, arm in arms.items()}, args.repeats, device, warmup=0)


def flops_per_image(net, steps):
    """Floating-point operations of matrix products and convolutions in all 2N - 1 network evaluations of one image."""
    x = torch.zeros([1, net.img_channels, *resolution(net)], device=network_device(net))
    labels = torch.zeros(1, net.label_dim, device=x.device) if net.label_dim else None
    with torch.no_grad():
        return measure.count_flops(lambda: net(x, torch.tensor(1.0), labels)) * (2 * steps - 1)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--arch', choices=sorted(SHAPES), default='small')
    parser.add_argument('--images', type=int, default=96)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--steps', type=int, default=18)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--precision', choices=sorted(misc.DTYPES), default='fp32')
    parser.add_argument('--compile', action='store_true', help='compile the U-Net of this program')
    parser.add_argument('--layout', choices=['nchw', 'nhwc'], help='layout of its weights; by default its own')
    parser.add_argument('--peers', action='store_true', help='also the installed peers, and the published settings')
    parser.add_argument('--peer-precision', choices=['fp32', 'bf16'], default='fp32')
    parser.add_argument('--peer-compile', action='store_true', help='compile the peers\' networks, too')
    parser.add_argument('--threads', type=int, help='CPU threads')
    parser.add_argument('--peak-tflops', type=float, help='peak of the device at this precision; by default measured')
    parser.add_argument('--json', help='also write the numbers to this file')
    return parser.parse_args(argv)


def entrants(args, device):
    """({arm: function(count, batch, steps, folder)}, {arm: FLOPs of an image})."""
    flops = flops_per_image(make_network(args.arch, device, 'fp32', False), args.steps)  # compiled calls are not counted
    net = make_network(args.arch, device, args.precision, args.compile, args.layout)
    arms = {f'generate_images, {WRITERS} writer threads': lambda *work: ours(net, *work),
            'generate_images, saves as it goes': lambda *work: ours(net, *work, threads=0),
            'plain loop, saves as it goes': lambda *work: plain_loop(net, *work)}
    work = dict.fromkeys(arms, flops)
    if args.peers:
        plain = make_network(args.arch, device, 'fp32', False, 'nchw')
        arms['published settings'], work['published settings'] = lambda *work: ours(plain, *work), flops
        for found in contestants.peer_samplers(SHAPES[args.arch], device, args.peer_precision, args.peer_compile):
            arms[found.name] = lambda *work, found=found: peer(found, *work)
            work[found.name] = found.flops * (2 * args.steps - 1)
    return arms, work


def rows_of(spent, work, args):
    """The figures of each arm, as measure.compare() takes them. work: {arm: FLOPs of an image}."""
    return [{'network': args.arch, 'contestant': name, 'batch': args.batch, 'flops_per_image': work[name],
             'images_per_second': [args.images / one.wall for one in found],
             'flops_per_second': [args.images * work[name] / one.wall for one in found],
             'flops_per_cpu_second': [args.images * work[name] / one.cpu for one in found]} for name, found in spent.items()]


def main(argv=None):
    args = parse(argv)
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    arms, work = entrants(args, device)
    peak = args.peak_tflops * 1e12 if args.peak_tflops else measure.matrix_peak(device, misc.DTYPES[args.precision])
    print(f'{args.arch} network, {args.images} images, batch {args.batch}, {args.steps} Heun steps, {args.precision}'
          f'{", compiled" if args.compile else ""}; {measure.machine(device)}', *(contestants.missing() if args.peers else []), sep='\n')
    rows = rows_of(rates(arms, args, device), work, args)
    for row in rows:
        rate, share = row['images_per_second'], statistics.median(row['flops_per_second']) / peak
        print(f'  {row["contestant"]:38} {statistics.median(rate):9,.1f} images/s  ({min(rate):,.1f} to {max(rate):,.1f})   '
              f'{share:6.1%} of the limit')
    compared, most = measure.compare(rows), work[rows[0]['contestant']]
    print(f'  {most / 1e9:,.2f} GFLOP per image; the limit at {peak / 1e12:.4g} TFLOP/s is {peak / most:,.0f} images/s')
    for found in compared:
        print(f'  {found["first"]} / {found["other"]}: {found["per_flop"]:.2f} per FLOP, {found["per_flop_cpu"]:.2f} by CPU time, '
              f'{found["per_image"]:.2f} per image')
    measure.write(args.json, device, options=vars(args), peak_flops=peak, rows=rows, comparisons=compared)


if __name__ == '__main__':
    main()
