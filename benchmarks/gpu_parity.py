# SPDX-License-Identifier: Apache-2.0
"""How far half precision, the compiler and the GPU itself change a network's gradients, and the losses of a training, from fp32 as it is.

python benchmarks/gpu_parity.py [--json=FILE]

On a CPU only bfloat16 is compared, without the compiler."""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import contestants, measure  # noqa: E402 (the folder above had to be found first)
from torch_utils import misc, registry  # noqa: E402
from training.networks.interface import ARCHS  # noqa: E402
from training.networks.preconditioning import build_network  # noqa: E402

NETWORKS = {'ddpmpp': 'ddpmpp:cbase=64,cres=1|2,blocks=1,attn=8,dropout=0', 'ncsnpp': 'ncsnpp:cbase=64,cres=1|2,blocks=1,attn=8,dropout=0',
            'adm': 'adm:cbase=64,cres=1|2,blocks=1,attn=8,dropout=0', 'edm2': 'edm2:cbase=64,cres=1|2,blocks=1,attn=8',
            'dit': 'dit:width=128,depth=4,heads=4', 'uvit': 'uvit:width=128,depth=4,heads=4', 'vit': 'vit:width=128,depth=4,heads=4'}
# Largest relative difference |a - b| / |b| of all gradients together. bf16 has 8 bits of mantissa, fp16 11; sums are float32.
BOUNDS = {'bf16': 0.05, 'fp16': 0.01, 'compiled': 1e-3, 'device': 1e-3}
FP16_SCALE = 2.0 ** 16  # of the loss, so that small gradients do not round to 0
STEPS, LOSS_BOUND = 20, 0.03  # of a short training, and the largest relative difference of its last loss in bf16


def network(arch: str) -> torch.nn.Module:
    """A network of 16x16 images whose weights are all random, so that no part of it is dead."""
    config = registry.build(NETWORKS[arch], ARCHS, '--arch')() | {'img_resolution': 16, 'img_channels': 3, 'label_dim': 10}
    with misc.seeded('parity'):
        net = build_network(config).train()
    source = misc.generator('parity', arch)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=source))
    return net


def gradient(arch: str, device: torch.device, precision: str = 'fp32', compile: bool = False, layout: str = 'nchw') -> torch.Tensor:
    """All gradients of a squared error, float64 in one vector."""
    net = network(arch).to(device)
    net.compute_dtype = misc.PRECISIONS[precision]
    contestants.set_layout(net, layout)
    if compile:
        net.model.compile(dynamic=False)
    draw = lambda name, *size: torch.randn(*size, generator=misc.generator('parity', name)).to(device)
    clean, sigma, labels = draw('clean', 16, 3, 16, 16) / 2, draw('sigma', 16).exp(), torch.eye(10, device=device)[torch.arange(16) % 10]
    noisy = clean + sigma.reshape(-1, 1, 1, 1) * draw('noise', 16, 3, 16, 16)
    weight = (sigma ** 2 + 0.25) / (sigma / 2) ** 2
    loss = ((net(noisy, sigma, labels) - clean).square().flatten(1).mean(1) * weight).mean()
    scale = FP16_SCALE if precision == 'fp16' else 1.0
    (loss * scale).backward()
    return torch.cat([p.grad.flatten().double() for p in net.parameters() if p.grad is not None]).cpu() / scale


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|; infinite where a is not finite."""
    return float((a - b).norm() / b.norm()) if a.isfinite().all() else float('inf')


def final_loss(device: torch.device, flags: list[str]) -> float:
    """The mean loss of the last half of a short training, with the same draws whatever the arithmetic."""
    with contextlib.redirect_stdout(sys.stderr), contestants.our_trainer('parity', contestants.SHAPES['small'], 64, device, flags) as one:
        run, found = one.step.__self__, []
        for _ in range(STEPS):
            one.step()
            stats = run.stats.flush()
            found.append(next(s['mean'] for name, s in stats.items() if name.startswith('Loss/') and s['mean'] is not None))
    return sum(found[STEPS // 2:]) / (STEPS - STEPS // 2)


def compare(device: torch.device) -> list[dict]:
    """[{"what", "error", "bound"}]."""
    rows, on_gpu = [], device.type == 'cuda'
    variants = {'bf16': dict(precision='bf16')}
    if on_gpu:
        variants |= {'bf16, nhwc, compiled': dict(precision='bf16', compile=True, layout='nhwc'), 'fp16': dict(precision='fp16'),
                     'fp32, compiled': dict(compile=True)}
    for arch in NETWORKS:
        exact = gradient(arch, device)
        if on_gpu:
            rows.append(told(f'{arch}: GPU beside CPU, fp32', difference(exact, gradient(arch, torch.device('cpu'))), BOUNDS['device']))
        for name, options in variants.items():
            if options.get('compile') and arch != 'ddpmpp':  # compiling takes long
                continue
            torch._dynamo.reset()
            kind = options.get('precision', 'compiled')
            rows.append(told(f'{arch}: {name}', difference(gradient(arch, device, **options), exact), BOUNDS[kind]))
    plain = ['--compile=0', '--lr-rampup=0', '--augment=0']
    losses = [final_loss(device, [f'--precision={precision}', *plain]) for precision in ('fp32', 'bf16')]
    rows.append(told(f'loss after {STEPS} steps: bf16', abs(losses[1] / losses[0] - 1), LOSS_BOUND))
    return rows


def told(what, error, bound):
    """A row, printed at once."""
    print(f'{what:34} {error:.2e}  (at most {bound:g})  {"PASS" if error <= bound else "FAIL"}', flush=True)
    return {'what': what, 'error': error, 'bound': bound}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', help='also write the numbers to this file')
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', folder)
        measure.write(args.json, device, rows=compare(device))


if __name__ == '__main__':
    main()
