# SPDX-License-Identifier: Apache-2.0
"""What an autoencoder makes of white noise: covariance, dependence on the picture, and bias of the noise of encoded noisy pictures.

python benchmarks/latent_noise.py train --data=cifar.zip --dest=small-vae
python benchmarks/latent_noise.py measure --data=cifar.zip --vae=small-vae --sigma=0.2

"train" makes a small AutoencoderKL (needs diffusers); "measure" takes any."""

import sys
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch_utils import misc  # noqa: E402 (the folder above had to be found first)
from torch_utils.command_line import Command, Group  # noqa: E402
from training.data.dataset import ImageDataset  # noqa: E402
from training.networks.autoencoder import open_autoencoder  # noqa: E402

DRAWS = 16   # noises of each picture
PATCH = 2    # side of the squares of latents whose covariance is taken
REPORT = 100


@click.group(cls=Group)
def main():
    """White noise of pixels, as latents."""


def batch_of(dataset, generator, size):
    """Random pictures in [-1, 1], float32 [size,C,H,W]."""
    rows = torch.randint(len(dataset), [size], generator=generator).numpy()
    return dataset.to_network(np.stack([dataset.decode(i) for i in rows]))


@main.command(cls=Command)
@click.option('--data', required=True, metavar='DATA', help='8-bit RGB pictures')
@click.option('--dest', required=True, metavar='DIR', help='Where the autoencoder goes')
@click.option('--steps', default=3000, show_default=True, metavar='INT', help='Steps of Adam')
@click.option('--batch', default=32, show_default=True, metavar='INT', help='Pictures a step')
def train(data, dest, steps, batch):
    """Train an AutoencoderKL of factor 4 and 4 channels: absolute error, and 1e-6 times the divergence from N(0, 1)."""
    import diffusers
    dataset, source = ImageDataset(data), misc.generator('latent noise')
    with misc.seeded('latent noise'):
        vae = diffusers.AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=['DownEncoderBlock2D'] * 3, up_block_types=['UpDecoderBlock2D'] * 3)
    optimizer, total = torch.optim.Adam(vae.parameters(), lr=2e-3), 0.0
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group['lr'] = 2e-3 * min(1, 2 * (1 - (step - 1) / steps))
        x = batch_of(dataset, source, batch)
        found = vae.encode(x).latent_dist
        z = found.mean + found.std * torch.randn(found.mean.shape, generator=source)
        loss = (vae.decode(z).sample - x).abs().sum() / batch + 1e-6 * found.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) / x[0].numel()
        if step % REPORT == 0:
            print(f'step {step}: absolute error {total / REPORT:.4f} in [-1, 1]', flush=True)
            total = 0.0
    vae.save_pretrained(dest)


@main.command(cls=Command)
@click.option('--data', required=True, metavar='DATA', help='8-bit RGB pictures')
@click.option('--vae', required=True, metavar='REF', help='Autoencoder')
@click.option('--sigma', default=0.2, show_default=True, metavar='FLOAT', help='Std of the noise of pixels in [-1, 1]')
@click.option('--num', default=500, show_default=True, metavar='INT', help='Pictures')
@torch.no_grad()
def measure(data, vae, sigma, num):
    """Print what the noise of the latents is like, in units in which the latents' std is 0.5."""
    dataset, autoencoder, source = ImageDataset(data, max_size=num), open_autoencoder(vae), misc.generator('white noise')
    clean, noise = [], []
    for first in range(0, len(dataset), 50):
        x = dataset.to_network(np.stack([dataset.decode(i) for i in dataset.raw_idx[first:first + 50]]))
        latents = autoencoder.moments(x)[0]
        clean.append(latents)
        noise.append(torch.stack([autoencoder.moments(x + sigma * torch.randn(x.shape, generator=source))[0] - latents
                                  for _ in range(DRAWS)], dim=1))
    clean, noise = torch.cat(clean), torch.cat(noise)  # [N,C,h,w], [N,DRAWS,C,h,w]
    noise = noise / clean.std(dim=(0, 2, 3)).mul(2).reshape(-1, 1, 1)
    report(noise.double(), sigma)
    print('the same of white noise of that size:')
    report(noise.double().std() * torch.randn(noise.shape, generator=source, dtype=torch.float64), None)


def report(noise, sigma):
    """Prints the statistics of noise [N,DRAWS,C,h,w]."""
    bias = noise.mean(1, keepdim=True)
    scatter = (noise - bias) * (DRAWS / (DRAWS - 1)) ** 0.5
    if sigma is not None:
        print(f'sigma {sigma:g} in pixels: std {scatter.std():.3f} in latents, and a shift of {bias.square().mean().sqrt():.3f} (root mean '
              'square) that all noises of a picture share')
    channels = scatter.shape[2]
    flat = scatter.permute(2, 0, 1, 3, 4).flatten(1)
    print('std of each channel: ' + ', '.join(f'{float(std):.3f}' for std in flat.std(1)))
    off = torch.corrcoef(flat) - torch.eye(channels)
    print(f'largest correlation of two channels: {float(off.abs().max()):.2f}')
    near = [(scatter[..., :, :-1] * scatter[..., :, 1:]).mean((0, 1, 3, 4)) / scatter.square().mean((0, 1, 3, 4)),
            (scatter[..., :-1, :] * scatter[..., 1:, :]).mean((0, 1, 3, 4)) / scatter.square().mean((0, 1, 3, 4))]
    far = torch.stack(near).flatten()
    print(f'largest correlation of neighbours in a channel: {float(far[far.abs().argmax()]):.2f}')
    patches = scatter.unfold(3, PATCH, PATCH).unfold(4, PATCH, PATCH).permute(0, 1, 3, 4, 2, 5, 6).flatten(4).flatten(0, 3)
    values = torch.linalg.eigvalsh(torch.cov(patches.T))
    print(f'eigenvalues of the covariance of {PATCH}x{PATCH} latents: {float(values[0]):.5f} to {float(values[-1]):.5f}, a ratio of '
          f'{float(values[-1] / values[0]):.1f}')
    each = scatter.square().mean((1, 2, 3, 4)).sqrt()
    low, high = each.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    print(f'std by picture, 5 % and 95 % quantile: {low:.3f}, {high:.3f}')


if __name__ == '__main__':
    main()
