# SPDX-License-Identifier: Apache-2.0
"""What denoising found: quality against references, intervals, whether the stated noise is there; as lines, JSON, CSV and a picture."""

import csv
import math
import os
from typing import Any

import numpy as np

from dnnlib import EasyDict
from dnnlib.files import replacing, write_json
from dnnlib.versions import versions
from metrics.report import number
from torch_utils import misc
from training.data.convert import sheet
from training.data.convert.writers import encode_npy
from training.restoration import quality
from training.restoration.images import ImageSet
from training.restoration.posterior import Estimate, Method

SHOWN = 8  # images of the picture
NAMED = 3  # names in a line about several images
NOISE_OFF = 0.15  # deviation of the noise that is found from the noise stated that is worth a warning
PLAIN = {'offset': 0.0, 'scale': 1.0}  # units of images in network units
MEANS = ('psnr_before', 'psnr_after', 'ssim_before', 'ssim_after', 'coverage', 'noise', 'apart')


class Report:
    """Collects what is found of each image. reference: has of(index), the clean image in network units; or None."""

    def __init__(self, images: ImageSet, reference: Any, method: Method, sigmas: np.ndarray) -> None:
        self.images, self.reference, self.method, self.sigmas = images, reference, method, sigmas
        self.rows, self.cells = [], []

    def add(self, found: Estimate, written: np.ndarray) -> None:
        """Takes an Estimate, and the image as it was written, from which the quality is measured."""
        images, index = self.images, found.index
        row = {'name': images.names[index], 'sigma': float(self.sigmas[index])}
        row |= {key: value for key, value in (('noise', found.noise), ('apart', found.apart)) if value is not None}
        shown, clean = len(self.cells) < SHOWN, None
        before = images.network(index) if shown or self.reference else None
        after = images.scaled(written, clean=True) if shown or self.reference else None
        if self.reference:
            clean = self.reference.of(index)
            for name, measure in (('psnr', quality.psnr), ('ssim', quality.ssim)):
                row |= {f'{name}_before': measure(before, clean), f'{name}_after': measure(after, clean)}
            if found.std is not None:
                row['coverage'] = quality.coverage(found.mean, found.std, clean, self.method.samples)
        self.rows.append(row)
        if shown:
            self.cells.append((row['name'], before, after, found.std, clean))

    def means(self) -> dict:
        """{name: {"mean", "standard_error"}} over images, of what is known; infinite values are left out."""
        found = {}
        for name in MEANS:
            values = [row[name] for row in self.rows if math.isfinite(row.get(name, math.nan))]
            if values:
                error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
                found[name] = {'mean': float(np.mean(values)), 'standard_error': error}
        return found

    def lines(self, clipped: dict[str, int]) -> list[str]:
        """The numbers as lines of text, and warnings. clipped: {name: values beyond the range of their type}."""
        means, told = self.means(), []
        value = lambda name: number(means[name]['mean'])
        if 'psnr_after' in means and 'psnr_before' in means:
            told += [f'PSNR {means["psnr_before"]["mean"]:.2f} dB before, {means["psnr_after"]["mean"]:.2f} dB after; SSIM '
                     f'{value("ssim_before")} before, {value("ssim_after")} after (means of {len(self.rows)} images)']
        if 'coverage' in means:
            error = means['coverage']['standard_error']
            told.append(f'Intervals that state {quality.LEVEL:.0%} hold for {means["coverage"]["mean"]:.1%} of the values'
                        + (f', standard error {error:.1%}' if error else ''))
        if 'noise' in means:
            told.append(f'Noise found over noise stated: {value("noise")}'
                        + (f'; mean of samples against E[x_0 | y], in its standard errors: {value("apart")}' if 'apart' in means else ''))
            if abs(means['noise']['mean'] - 1) > NOISE_OFF:
                told.append('Warning: the noise of the images is not that of the stated levels, or the network does not know such images')
        if clipped:
            some = ', '.join(f'{name} ({count})' for name, count in list(clipped.items())[:NAMED])
            told.append(f'{sum(clipped.values())} values of {len(clipped)} images were beyond the range of their type and set to its ends: '
                        f'{some}{", ..." if len(clipped) > NAMED else ""}')
        return told

    def write(self, path: str, o: EasyDict, net: Any, clipped: dict[str, int]) -> None:
        """Writes a .json of everything, or a .csv with a row for each image."""
        if path.lower().endswith('.csv'):
            keys = list(dict.fromkeys(key for row in self.rows for key in row))
            with replacing(path) as part, open(part, 'w', newline='', encoding='utf-8') as file:
                table = csv.DictWriter(file, keys)
                table.writeheader()
                table.writerows(self.rows)
            return
        noisy = self.sigmas[self.sigmas > 0]
        stated = {'level': quality.LEVEL, 'factor': quality.interval_factor(self.method.samples)} if self.method.samples > 1 else None
        write_json(path, {
            'kind': 'denoised images', 'network': o.network, 'weights': o.weights, 'sha256': misc.state_digest(net), 'data': o.data,
            'reference': o.reference, 'dest': o.dest, 'num_images': len(self.sigmas), 'num_denoised': len(noisy),
            'sigma': {'min': float(noisy.min()), 'median': float(np.median(noisy)), 'max': float(noisy.max())},
            'units': self.images.units, 'range': quality.RANGE, 'samples': self.method.samples,
            'steps': self.method.steps if self.method.samples else None, 'seed': self.method.seed if self.method.samples else None,
            'overlap': self.method.overlap, 'precision': o.precision, 'interval': stated, **self.means(), 'clipped': clipped,
            'images': self.rows, **versions()}, null=True)

    def draw(self, path: str, dest: str) -> None:
        """Writes the picture: a row for each of the first images."""
        top = max((float(std.mean(0).max()) for _, _, _, std, _ in self.cells if std is not None), default=0.0) or 1.0
        rows = []
        for (name, before, after, std, clean), row in zip(self.cells, self.rows):
            cells = [(before, f'sigma {row["sigma"]:.3g}'), (after, 'after')]
            cells += [(std.mean(0, keepdims=True) / top * 2 - 1, f'std, white {top:.2g}')] if std is not None else []
            cells += [(clean, 'reference')] if clean is not None else []
            rows.append((os.path.basename(name), [('.npy', encode_npy(image), note) for image, note in cells]))
        sheet.draw(path, f'{os.path.basename(os.path.abspath(dest))}, in network units', rows, PLAIN)

