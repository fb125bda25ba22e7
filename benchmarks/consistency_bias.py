# SPDX-License-Identifier: Apache-2.0
"""Bias of the consistency term: its value for exact denoisers in 2-D, where it should be zero, for every chain and number of steps.

python benchmarks/consistency_bias.py [--points=8000] [--samples=128]"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.objective.consistency import CHAINS, consistency_error, u_statistic  # noqa: E402 (the folder above had to be found first)

PAIRS = [(0.5, 0.25), (0.5, 0.05), (0.6, 0.3)]  # sigma -> sigma'
STEPS = [1, 2, 5, 20]
FACTORS = [1.0, 0.9, 1.1]  # the denoiser is multiplied by these: exact, and two wrong ones


class MixtureData:
    """A mixture of equally likely isotropic Gaussians and its exact denoiser; means [M,2], one std."""

    def __init__(self, means, std):
        self.means, self.std = torch.as_tensor(means, dtype=torch.float64), std

    def draw(self, count, generator):
        """[count,2,1,1] clean points."""
        which = torch.randint(len(self.means), (count,), generator=generator)
        unit = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        return (self.means[which] + self.std * unit)[..., None, None]

    def denoise(self, x, sigma):
        """E[x_0 | x] for x [N,2,1,1] in any float dtype; sigma [N,1,1,1] or a number."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        means = self.means.to(x)[None, :, :, None, None]  # [1,M,2,1,1]
        variance = (self.std ** 2 + sigma ** 2)[:, None]  # [N,1,1,1,1]
        offset = x[:, None] - means
        share = (-offset.square().sum(2, keepdim=True) / (2 * variance)).softmax(1)
        return (share * (means + self.std ** 2 / variance * offset)).sum(1)


DATA = {'gaussian': MixtureData([[0.0, 0.0]], 0.5),
        'mixture': MixtureData([[0.6, 0.6], [-0.6, 0.6], [0.6, -0.6], [-0.6, -0.6]], 0.1)}


def values(data, step, steps, pair, factor, points, samples, seed=0, chains=200_000):
    """(U, Var / K) of every point, each [points], summed over the two coordinates. The factor multiplies the denoiser in every call.

    The mean form is U + Var / K, identically. Points and noises are the same for every factor, so that differences are paired."""
    generator, chunk = torch.Generator().manual_seed(seed), max(1, chains // samples)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    net = lambda x, sigma, **labels: factor * data.denoise(x, sigma)
    found = []
    for first in range(0, points, chunk):
        n = min(chunk, points - first)
        sigma, sigma_prime = (torch.full([n, 1, 1, 1], level) for level in pair)
        x = data.draw(n, generator).float() + sigma * normal(n, 2, 1, 1)
        noise = [normal(n, samples, 2, 1, 1) for _ in range(steps)]
        error = consistency_error(net, x, sigma, sigma_prime, net(x, sigma), noise, step=step)
        found.append(torch.stack([u_statistic(error), error.var(1) / samples]).flatten(2).sum(2))
    return torch.cat(found, 1)


def measure(*args, **kwargs):
    """(U, its standard error, Var / K): means over the points of values(...)."""
    u, spread = values(*args, **kwargs)
    return u.mean().item(), (u.std() / len(u) ** 0.5).item(), spread.mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--points', type=int, default=8000)
    parser.add_argument('--samples', type=int, default=128, help='chains per point (K)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f'{args.points} points, K = {args.samples}, in units of 1e-4: U +- standard error; last column Var / K at the exact D\n')
    print('| data | sigma | chain | steps | exact D | 0.9 D | 1.1 D | Var / K |\n| --- | --- | --- | --- | --- | --- | --- | --- |')
    for name, data in DATA.items():
        for pair in PAIRS:
            for chain, term in CHAINS.items():
                for steps in STEPS:
                    found = [measure(data, term.step, steps, pair, factor, args.points, args.samples) for factor in FACTORS]
                    cells = ' | '.join(f'{1e4 * u:.2f} ± {1e4 * error:.2f}' for u, error, _ in found)
                    print(f'| {name} | {pair[0]} → {pair[1]} | {chain} | {steps} | {cells} | {1e4 * found[0][2]:.1f} |', flush=True)


if __name__ == '__main__':
    main()
