# SPDX-License-Identifier: Apache-2.0
"""Mean and standard deviation of images per channel, and a check of samples against those of the data that detects wrong colours.

Statistics are {"mean", "std", "image_mean_std", "image_variance_std": a number for each channel, "num_images", "classes"}, in network
units: mean and std of all pixels, and the standard deviations over images of their mean and of their mean square about "mean". classes:
"balanced" where every class has the same weight, "as they are" where labels do not matter or are not classes."""

import math
from typing import Any

import torch

from torch_utils import distributed

NUMBERS = ('mean', 'std', 'image_mean_std', 'image_variance_std')
LEAST = 16        # fewest samples that are compared
LIMIT = 6.0       # standard errors: a normal variable exceeds them with probability 2e-9
VISIBLE = 0.1     # smallest difference of a mean or std to warn about: in [-1,1] for 8-bit images, in units of 2 channel stds for others


def moments(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(means, mean squares) of each image's channels, float64 [n,C] each; images [n,C,H,W] in network units."""
    images = images.double()
    return images.mean(dim=(2, 3)), images.square().mean(dim=(2, 3))


def statistics(means: torch.Tensor, squares: torch.Tensor, classes: torch.Tensor | None = None) -> dict:
    """Statistics of a set of images from their moments, [N,C] each. classes: int64 [N], to give every class the same weight, or None."""
    weights = torch.ones(len(means), dtype=torch.float64)
    if classes is not None:
        _, which, counts = classes.unique(return_inverse=True, return_counts=True)
        weights = 1 / counts[which].double()
    weights = (weights / weights.sum())[:, None]
    mean = (weights * means).sum(0)
    about = squares - 2 * mean * means + mean ** 2  # mean square about the mean of all
    variance = (weights * about).sum(0).clamp(min=0)
    spread = lambda values, centre: (weights * (values - centre).square()).sum(0).sqrt().tolist()
    return {'mean': mean.tolist(), 'std': variance.sqrt().tolist(), 'image_mean_std': spread(means, mean),
            'image_variance_std': spread(about, variance), 'num_images': len(means),
            'classes': 'as they are' if classes is None else 'balanced'}


def checked(found: object, channels: int) -> dict | None:
    """The statistics, if they are well-formed and of that many channels; else None, because no result depends on them."""
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= abs(value) < math.inf
    numbers = lambda value: isinstance(value, list) and len(value) == channels and all(map(number, value))
    good = isinstance(found, dict) and all(numbers(found.get(key)) for key in NUMBERS) and type(found.get('num_images')) is int
    return found if good and found['num_images'] > 0 else None


def expected(net: torch.nn.Module, labels: str | None = None, class_idx: int | None = None, stop_sigma: float | None = None,
             stop_variance: float | None = None) -> dict | None:
    """The statistics that samples of a network should have with these options of generate.py; None where they are unknown."""
    found = checked(getattr(net, 'data_statistics', None), net.img_channels)
    chosen = class_idx is not None or labels not in (None, 'uniform')
    if found is None or stop_sigma or stop_variance or net.label_dim and (chosen or found.get('classes') != 'balanced'):
        return None
    return found


class Channels:
    """Sums over sampled images, from which the ranks together compute means. Attribute sums: float64 [2C + 2]."""

    def __init__(self, net: torch.nn.Module, **options: Any) -> None:
        """options: those of expected()."""
        self.data, self.units = expected(net, **options), net.units
        self.sums = torch.zeros(2 * net.img_channels + 2, dtype=torch.float64)

    def take(self, images: torch.Tensor) -> None:
        """Adds images [n,C,H,W] in network units; 8-bit ones are clipped to [-1,1] as in their files. Non-finite images are left out."""
        if self.data is None:
            return
        finite = images.isfinite().flatten(1).all(1)
        good = images[finite] if self.units is not None else images[finite].clamp(-1, 1)
        means, squares = moments(good)
        self.sums += torch.cat([means.sum(0), squares.sum(0), finite.sum()[None].double(), (~finite).sum()[None].double()]).cpu()

    def report(self) -> None:
        """Prints the warning about the images of all ranks. Every rank calls this, once."""
        self.sums = distributed.all_sum(self.sums.to(distributed.device())).cpu()
        if warning := self.warning():
            distributed.print0(f'Warning: {warning}')

    def fields(self) -> dict:
        """{"Samples/num_images", "Samples/mean_0", "Samples/std_0", ...}; {} where nothing is known of the data."""
        count, mean, std = self._measured()
        if self.data is None:
            return {}
        return {'Samples/num_images': count, **{f'Samples/mean_{c}': float(value) for c, value in enumerate(mean)},
                **{f'Samples/std_{c}': float(value) for c, value in enumerate(std)}}

    def _measured(self):
        *sums, count, _ = self.sums.tolist()
        mean, square = (torch.tensor(sums, dtype=torch.float64) / max(count, 1)).chunk(2)
        return int(count), mean, (square - mean ** 2).clamp(min=0).sqrt()

    def warning(self) -> str | None:
        """One line about channels whose mean or std differs from that of the data by more than chance explains, else None.

        A difference counts if it exceeds VISIBLE and LIMIT standard errors, which follow from the spread of the data's own images and
        both numbers of images. Fewer than LEAST images are not compared."""
        (count, mean, std), data = self._measured(), self.data
        if data is None or count < LEAST:
            return None
        share, found = math.sqrt(1 / count + 1 / data['num_images']), []
        for c in range(len(mean)):
            visible = VISIBLE if self.units is None else 2 * VISIBLE * data['std'][c]
            away, apart = float(mean[c]) - data['mean'][c], float(std[c]) - data['std'][c]
            error = data['image_mean_std'][c] * share
            error_2 = data['image_variance_std'][c] * share  # of the variance
            if abs(away) > max(visible, LIMIT * error):
                found.append(f'channel {c} has mean {float(mean[c]):.2f}, the data {data["mean"][c]:.2f}')
            elif abs(apart) > visible and abs(float(std[c]) ** 2 - data['std'][c] ** 2) > LIMIT * error_2:
                found.append(f'channel {c} has std {float(std[c]):.2f}, the data {data["std"][c]:.2f}')
        return f'the colours of {count} samples differ from those of the data: {"; ".join(found)} (in network units)' if found else None
