# SPDX-License-Identifier: Apache-2.0
"""Distance of the minimiser of pseudo_huber from the conditional mean, without sampling: a skewed two-point distribution, with and
without noise.

python benchmarks/penalty_bias.py"""

import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch_utils.command_line import Command, version_option  # noqa: E402 (the folder above had to be found first)
from training.diffusion import ambient  # noqa: E402
from training.objective import penalty  # noqa: E402

RARE = 0.1  # P(x_0 = 1); otherwise x_0 = 0: mean 0.1, median 0, std 0.3
STD = (RARE * (1 - RARE)) ** 0.5
THRESHOLDS = (10.0, 3.0, 1.0, 0.5, 0.1, 0.01)
OWN_LEVELS, SIGMA, SEEN = (0.0, 0.2, 0.5, 0.9), 1.0, (0.0, 1.0)  # sigma_n; sigma; the noisy values x to denoise
FAR = 1e9  # a level so high that c_out is sigma_data
GRID, REACH = 2001, 8.0  # points of the quadrature in y, and how many standard deviations of the bridge it spans
HALVINGS = 48


def minimiser(points, mass, prediction, sigma, c, sigma_data, low=-1.0, high=2.0):
    """For each row, the D that minimises the expected pseudo_huber of prediction(D) - points, by bisection of its slope.

    points, mass: [rows, K], target values and their probabilities. prediction: an increasing linear function of D [rows, 1]."""
    low, high = (torch.full([len(points), 1], end, dtype=torch.float64) for end in (low, high))
    level = torch.full([1, 1], sigma, dtype=torch.float64)
    for _ in range(HALVINGS):
        middle = ((low + high) / 2).requires_grad_()
        cost = penalty.pseudo_huber(prediction(middle) - points, level, c=c, schedule='constant', sigma_data=sigma_data)
        slope, = torch.autograd.grad((mass * cost).sum(), middle)
        middle = middle.detach()
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return ((low + high) / 2).flatten()


def bare(c):
    """The minimiser where x_0 itself is the target, with c_out = 1: the mean is RARE, the median 0."""
    points, mass = (torch.tensor([row], dtype=torch.float64) for row in ([0.0, 1.0], [1 - RARE, RARE]))
    return minimiser(points, mass, lambda D: D, FAR, c, sigma_data=1.0).item()


def posterior(x, sigma):
    """P(x_0 = 1 | x_0 + sigma noise = x) = E[x_0 | x], as a float."""
    odds = RARE / (1 - RARE) * torch.tensor((2 * x - 1) / (2 * sigma ** 2), dtype=torch.float64).exp()
    return (odds / (1 + odds)).item()


def ambient_bias(c, sigma_n, x, sigma=SIGMA):
    """The minimiser of the ambient loss of an image at level sigma_n, minus E[x_0 | x]: the minimiser of E rho((1 - r) D + r x - y).

    Given x_0 and x, y is normal: mean (1 - r) x_0 + r x, variance sigma_n^2 (1 - r), r = sigma_n^2 / sigma^2. c is in units of the
    residual of a network whose sigma_data is the standard deviation of x_0."""
    rare = posterior(x, sigma)
    r = (sigma_n / sigma) ** 2
    z = torch.linspace(-REACH, REACH, GRID if sigma_n else 1, dtype=torch.float64) if sigma_n else torch.zeros(1, dtype=torch.float64)
    bell = (-z.square() / 2).exp()
    centre = torch.tensor([[0.0], [1 - r]], dtype=torch.float64) + r * x
    points = (centre + sigma_n * (1 - r) ** 0.5 * z).reshape(1, -1)
    mass = (torch.tensor([[1 - rare], [rare]], dtype=torch.float64) * bell / bell.sum()).reshape(1, -1)
    seen = torch.tensor(x, dtype=torch.float64)
    predict = lambda D: ambient.predict_at(D.reshape(-1, 1, 1, 1), seen.reshape(1, 1, 1, 1), sigma, sigma_n).flatten(1)
    return minimiser(points, mass, predict, sigma, c, sigma_data=STD).item() - rare


def bare_table():
    """Table of the minimiser without noise and its expansion in 1 / c^2, as Markdown."""
    skew = RARE * (1 - RARE) * (1 - 2 * RARE)  # third central moment
    lines = ['| c | minimiser | less the mean | -mu_3 / (2 c^2) |', '| --- | --- | --- | --- |']
    for c in THRESHOLDS:
        found = bare(c)
        first = f'{-skew / (2 * c ** 2):+.4f}' if c >= 1 else ''
        lines.append(f'| {c:g} | {found:.4f} | {found - RARE:+.4f} | {first} |')
    return '\n'.join(lines)


def ambient_table(x):
    """Table of the minimiser minus E[x_0 | x], one row per c and one column per sigma_n, as Markdown."""
    lines = ['| c | ' + ' | '.join(f'sigma_n = {level:g}' for level in OWN_LEVELS) + ' |', '| --- |' + ' --- |' * len(OWN_LEVELS)]
    for c in THRESHOLDS:
        lines.append(f'| {c:g} | ' + ' | '.join(f'{ambient_bias(c, level, x):+.4f}' for level in OWN_LEVELS) + ' |')
    return '\n'.join(lines)


@click.command(cls=Command)
@version_option
def main():
    """Print the tables of docs/penalties.md: the minimiser of pseudo_huber and the conditional mean."""
    torch.set_num_threads(1)
    click.echo(f'x_0 = 1 with probability {RARE:g}, else 0; c_out = 1\n\n{bare_table()}')
    for x in SEEN:
        click.echo(f'\nx = {x:g} at sigma = {SIGMA:g}; E[x_0 | x] = {posterior(x, SIGMA):.4f}\n\n{ambient_table(x)}')


if __name__ == '__main__':
    main()
