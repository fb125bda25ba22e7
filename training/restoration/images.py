# SPDX-License-Identifier: Apache-2.0
"""The images to denoise: any set that dataset_tool.py reads, in network units, with the level and label of each."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dnnlib import UserError, text_record
from dnnlib.archive import DAMAGE, damage
from dnnlib.progress import Progress
from torch_utils import distributed
from training.data import tables
from training.data.convert.annotations import as_classes, check
from training.data.convert.sources import open_source, parse_source
from training.data.convert.stabilising import refuse_pictures
from training.data.convert.tiles import MAX_TILES
from training.data.dataset import UNITS_8BIT
from training.estimation.stabilise import Anscombe, from_record, of_units
from training.sampling import prompts
from training.sampling.generate import resolution

EXAMPLES = 3  # names in an error about several images


class ImageSet:
    """The images of --data or --reference: names; read(i) as stored, network(i) in network units, and back by stored().

    option, spec: the option and its value, as --source of dataset_tool.py. net: the network. told: units of --units, or None. Units are
    these, else the network's; images of a network of 8-bit pictures have those of their dataset.json where they are not 8-bit.
    Attributes source, path, is_8bit (of the first image), units {offset, scale}; counts: the Stabiliser of a network of counts, which
    the images are, or None. Raises UserError."""

    def __init__(self, option: str, spec: str, net: torch.nn.Module, told: dict | None = None) -> None:
        self.option, self.spec, self.path = option, spec, parse_source(spec)[0]
        try:
            self.source = open_source(spec)
        except UserError as err:
            told = err.message.replace('--source=', f'{option}=')
            raise UserError(told) from None
        self.names, self.channels = self.source.names, net.img_channels
        self.is_8bit = self.kind(0).is_8bit
        self.units = self._units(net, told)
        self.counts = None if told or self.source.stabilise else of_units(self.units)
        if self.counts:
            refuse_pictures(self.source, range(len(self)), [self.path], f'{option}={spec}')

    def __len__(self) -> int:
        return len(self.names)

    def _units(self, net, told):
        own, transforms = self.source.units if not self.is_8bit else None, (self.source.stabilise, (net.units or {}).get('stabilise'))
        if not told and transforms[0] not in (None, transforms[1]):
            known = [from_record(record).words() if record else 'none' for record in transforms]
            raise UserError(f'{self.option}={self.spec}: its values are stabilised counts ({known[0]}), and the transform of the network '
                            f'is another ({known[1]}); give the counts themselves')
        units = told or net.units or (UNITS_8BIT if self.is_8bit else own)
        if units is None:
            raise UserError(f'{self.option}={self.spec}: its values are not 8-bit and have no units, and the network was trained on 8-bit '
                            'pictures; say with --units=OFFSET,SCALE which values mean -1 and 1: OFFSET - SCALE and OFFSET + SCALE')
        sizes = {np.size(units[key]) for key in ('offset', 'scale')} - {1, self.channels}
        if sizes:
            raise UserError(f'--units: are for {max(sizes)} channels, and the network has {self.channels}')
        return units

    def kind(self, index: int) -> Any:
        """The Kind of an image. Raises UserError that names it."""
        try:
            return self.source.kind(index)
        except DAMAGE as err:
            raise UserError(f'{self.option}={self.spec}: {self.names[index]} cannot be read ({damage(err)})') from None

    def read(self, index: int) -> np.ndarray:
        """An image as stored, [C,H,W]. Raises UserError for files that are damaged or hold values that are not finite."""
        where = f'{self.option}={self.spec}: {self.names[index]}'
        try:
            image = self.source.read(index)
        except DAMAGE as err:
            raise UserError(f'{where} cannot be read ({damage(err)})') from None
        if image.dtype.kind not in 'uif':
            raise UserError(f'{where} has values of type {image.dtype}; expected real numbers')
        if bad := image.size - np.count_nonzero(np.isfinite(image)):
            raise UserError(f'{where} has {bad} of {image.size} values that are not finite (NaN or infinite); fill them in, or '
                            'leave it out')
        return image

    def network(self, index: int) -> np.ndarray:
        """A noisy image in network units, float64 [C,H,W]. Raises UserError for counts below 0."""
        image = self.read(index)
        if self.counts == Anscombe() and image.min() < 0:
            raise UserError(f'{self.option}={self.spec}: {self.names[index]} has values below 0 (least {image.min():g}), and the network '
                            'was trained on counts')
        return self.scaled(image)

    def scaled(self, image: np.ndarray, clean: bool = False) -> np.ndarray:
        """Values as stored, [C,H,W] -> network units, float64. clean: whether counts are means, such as restored images, and not noisy."""
        image = np.float64(image)
        if self.counts:
            image = self.counts.expected(image) if clean else self.counts.forward(image)
        return (image - tables.per_channel(self.units['offset'])) / tables.per_channel(self.units['scale'])

    def stored(self, image: np.ndarray, std: np.ndarray | None = None) -> np.ndarray:
        """Clean images in network units -> values as stored, float64; the inverse of scaled(clean=True).

        std: that of the samples whose mean the image is: the mean of their counts is above the counts of their mean."""
        found = np.float64(image) * tables.per_channel(self.units['scale']) + tables.per_channel(self.units['offset'])
        if not self.counts:
            return found
        variance = 0.0 if std is None else np.square(np.float64(std) * tables.per_channel(self.units['scale']))
        return self.counts.inverse(found) + self.counts.curvature(found) / 2 * variance

    def spread(self, std: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """A standard deviation in network units -> in those of the values as stored, float64; of counts to first order, at their mean."""
        scale, offset = (tables.per_channel(self.units[key]) for key in ('scale', 'offset'))
        found = np.float64(std) * scale
        return found * self.counts.slope(np.float64(mean) * scale + offset) if self.counts else found

    def own_units(self) -> dict:
        """Units of the values as stored: those of the network, or for counts the nearest linear ones around its 0."""
        if not self.counts:
            return self.units
        middle, scale = (np.float64(np.ravel(self.units[key])) for key in ('offset', 'scale'))
        found = self.counts.inverse(middle), scale * self.counts.slope(middle)
        return {key: value.tolist() if len(value) > 1 else value.item() for key, value in zip(('offset', 'scale'), found)}

    def check_shapes(self, net: torch.nn.Module, overlap: int) -> int:
        """Refuses images with other channels than the network's, or smaller ones; returns how many are larger, and tiled."""
        (height, width), wrong, tiled = resolution(net), [], 0
        for index in Progress(len(self), 'Reading headers').over(range(len(self))):
            kind = self.kind(index)
            if kind.channels != self.channels or kind.height < height or kind.width < width or kind.is_8bit != self.is_8bit:
                wrong.append(f'{self.names[index]} ({kind}, {kind.channels} channel{"s" * (kind.channels > 1)})')
            tiled += (kind.height, kind.width) != (height, width)
            step = max(1, height - overlap), max(1, width - overlap)
            if (kind.height // step[0] + 1) * (kind.width // step[1] + 1) > MAX_TILES:
                raise UserError(f'{self.option}={self.spec}: {self.names[index]} ({kind}) would be cut into more than {MAX_TILES} tiles; '
                                'cut it into several images first')
        if wrong:
            more = f', and {len(wrong) - EXAMPLES} more' if len(wrong) > EXAMPLES else ''
            what = '8-bit' if self.is_8bit else 'not 8-bit'
            raise UserError(f'{self.option}={self.spec}: the network takes {self.channels} channels and at least {width} x {height} '
                            f'pixels, and the first image is {what}; these differ: {", ".join(wrong[:EXAMPLES])}{more}; make them alike '
                            'with dataset_tool.py, or leave them out')
        return tiled

    def sigmas(self, sigma: float | None = None) -> np.ndarray:
        """The level of each image in network units, float64 [N]. sigma: one for all, in place of those of the set."""
        if sigma is not None:
            return np.full(len(self), sigma)
        if self.counts:
            return self._levels_of_counts()
        if self.source.sigmas is None:
            raise UserError(f'{self.option}={self.spec}: says no noise levels; give --sigma=STD in network units, or '
                            f'{self.option}={self.spec}:sigma=STD (or a table of them) in the units of the values')
        found = check(tables.levels, f'{self.option}={self.spec}: its table of noise levels', self.source.sigmas, self.names)
        own = self.source.units if not self.is_8bit else None
        if self.is_8bit:
            return found
        if own and (tables.common_scale(own) is None) != (tables.common_scale(self.units) is None):
            raise UserError(f'{self.option}={self.spec}: its levels are in other units than those of the network, whose channels have '
                            'different scales; give them with --sigma=STD in network units')
        if own and tables.common_scale(own) is None and own != self.units:
            raise UserError(f'{self.option}={self.spec}: its levels are in network units of other scales '
                            f'({tables.shown_all(own["scale"])}) than those of the network '
                            f'({tables.shown_all(self.units["scale"])}); give --sigma=STD')
        return found / tables.level_scale(self.units)


    def _levels_of_counts(self):
        """1 / scale for all images, since the stabilised noise has std 1; 0 for those that the set says to be clean."""
        told = np.float64([level or 0 for level in self.source.sigmas or [math.nan] * len(self)])
        if (told > 0).any():
            raise UserError(f'{self.option}={self.spec}: has levels above 0, and the noise of counts is that of their number; leave them '
                            'out, or give --sigma=STD in network units')
        scale = tables.common_scale(self.units)
        if scale is None:
            raise UserError(f'{self.option}={self.spec}: the channels of the network have different scales, and stabilised noise is not '
                            'white then; give --sigma=STD in network units')
        return np.where(np.isnan(told), 1 / scale, 0.0)


def labels_of(images: ImageSet, net: torch.nn.Module, class_idx: int | None, encoder: str | None,
              device: torch.device) -> torch.Tensor | None:
    """The label of each image, float32 [N, label_dim], or None for no label. Every rank calls this. Raises UserError.

    class_idx: the class of all. Otherwise the labels of the set; for networks of captions these or embedded captions of the set."""
    here = f'{images.option}={images.spec}'
    if not net.label_dim:
        if class_idx is not None:
            raise UserError(f'--class={class_idx}: the network is unconditional; leave the option out')
        return None
    if net.text:
        return _of_captions(images, net, class_idx, encoder, device, here)
    if class_idx is not None:
        if class_idx >= net.label_dim:
            raise UserError(f'--class={class_idx}: the network has classes 0 to {net.label_dim - 1}')
        return torch.eye(net.label_dim)[[class_idx]].expand(len(images), -1)
    if images.source.labels is None:
        if not net.config.get('label_dropout'):
            distributed.print0('Warning: the network is conditional and was trained without label dropout, and the images have no labels: '
                               'its estimates without a label are not meaningful; give --class, or labels in the set')
        return None
    return distributed.from_rank0(_of_labels, images.source.labels, net.label_dim, here)


def _of_labels(values: Sequence, label_dim: int, here: str) -> torch.Tensor:
    """Classes or vectors as float32 [N, label_dim]."""
    hint = f'give --class=INT, or {here}:label=none'
    names = {value for value in values if isinstance(value, str)}
    if names and len(names) != label_dim:
        raise UserError(f'{here}: its folders are {len(names)} classes by name, and the network has {label_dim}; {hint}')
    found = torch.from_numpy(check(tables.labels, f'{here}: its table of labels', as_classes(list(values))))
    if found.ndim == 2 and found.shape[1] != label_dim:
        raise UserError(f'{here}: its labels have {found.shape[1]} numbers, and the network takes {label_dim}; {hint}')
    if found.ndim == 1 and int(found.max()) >= label_dim:
        raise UserError(f'{here}: has class {int(found.max())}, and the network has classes 0 to {label_dim - 1}; {hint}')
    return found if found.ndim == 2 else torch.nn.functional.one_hot(found, label_dim).float()


def _of_captions(images, net, class_idx, encoder, device, here):
    source = images.source
    if class_idx is not None:
        raise UserError(f'--class={class_idx}: the network was trained on captions; leave the option out')
    if source.labels is not None and source.text is not None:
        if told := text_record.difference(net.text, source.text):
            raise UserError(f'{here}: its labels are not those of the network: {told}')
        return _of_labels(source.labels, net.label_dim, here)
    if not source.captions:
        raise UserError(f'{here}: the network was trained on captions, and these images have none; add them with '
                        'dataset_tool.py --captions')
    captions = [' '.join(text.split()) for text in source.captions]
    distinct = sorted(set(captions))
    place = {text: number for number, text in enumerate(distinct)}
    embed = lambda: torch.from_numpy(prompts.embed(net.text, distinct, encoder or net.text['encoder'], device))
    return distributed.from_rank0(embed)[[place[text] for text in captions]]


def data_state(path: str) -> list:
    """[size, time of the last change] of a file or folder, by which a changed set is noticed; [] for words and names that are no path."""
    if not os.path.exists(path):
        return []
    stat = os.stat(path)
    return [0 if os.path.isdir(path) else stat.st_size, stat.st_mtime_ns]
