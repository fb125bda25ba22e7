# SPDX-License-Identifier: Apache-2.0
"""The noisy images that a network was trained on, as the options of its run tell: each with its own level and its one fixed noise."""

import os

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.files import read_json
from torch_utils import misc
from training.data.dataset import ImageDataset
from training.data.identity import check_same
from training.data.store import ImageStore
from training.run.build import build_corruption
from training.run.config import Config, from_json
from training.run.folder import OPTIONS


def options_of(network: str, config: str | None = None) -> tuple[str, Config]:
    """(path, Config) of the options.json of the run that a network is of: `config`, or the file beside the network. Raises UserError."""
    path = config or os.path.join(os.path.dirname(os.path.abspath(network)), OPTIONS)
    if not os.path.isfile(path):
        raise UserError(f'--config={config}: no such file' if config else f'--network={network}: there is no {OPTIONS} of its run beside '
                        'it, which tells its data and how to train on; name that file with --config')
    try:
        return path, from_json(read_json(path))
    except UserError as err:
        raise UserError(err.message if path in err.message else f'{path}: {err.message}') from None


class NoisySet:
    """The images of a run, each at its level sigma_n, without mirrored copies; `items` are those with sigma_n > 0.

    config: the Config of the run. data: a data set in place of the run's own. Attributes: dataset (ImageDataset), sigma_n float64 [N]
    (network units), items int64 [n]. Raises UserError for data without noisy images, or whose noise is not white noise of the images."""

    def __init__(self, config: Config, data: str | None = None) -> None:
        o = config.data
        self.path, name = data or o.path, f'--data={data or o.path}'
        if not data and not os.path.exists(o.path):
            raise UserError(f'{o.path}: the run was trained on these data, and they are not there; name them with --data')
        self.dataset = ImageDataset(self.path, use_labels=o.use_labels, keep=o.keep, cache_dir=o.cache_dir)
        check_same(name, None if data else o.fingerprint, self.dataset)
        latents = self.dataset.latents
        if latents and (latents.distribution or latents.xflip):
            raise UserError(f'{name}: holds {"distributions of latents" if latents.distribution else "latents of mirrored pictures"}, '
                            'which cannot be restored one by one; encode them with dataset_tool.py encode --form=mean, not mirrored')
        if config.corruption.sigma_min_as == 'noise' and self.dataset.sigma_min.any():
            raise UserError(f'{name}: the run added noise up to the sigma_min of its images (sigma_min_as: noise), which are no clean '
                            'images with noise: nothing below that level can be restored')
        self.corruption = build_corruption(config.corruption)
        self.sigma_n = self.corruption.levels(self.dataset.raw_idx, self.dataset.native_sigma, self.dataset.image_shape)
        self.items = np.flatnonzero(self.sigma_n > 0)
        if not len(self.items):
            raise UserError(f'{name}: none of its {len(self.dataset)} images is noisy, by its dataset.json and the options of the run; '
                            'there is nothing to restore')
        self._store = ImageStore(self.dataset, self.corruption, self.sigma_n, cache_gib=0.0)

    def images(self, items: np.ndarray) -> torch.Tensor:
        """Items at their own levels, float32 [n,C,H,W], network units."""
        return self._store.gather(items)

    def labels(self, items: np.ndarray) -> torch.Tensor | None:
        """Labels of items, float32 [n,label_dim]; None where the run used none."""
        return torch.from_numpy(self.dataset.labels(items)) if self.dataset.label_dim else None

    def check_fits(self, net: torch.nn.Module, network: str) -> None:
        """Raises UserError where these are not images for that network."""
        form, label_dim = self.dataset.form, self.dataset.label_dim
        expected = [net.img_channels, *misc.height_width(net.img_resolution)]
        if list(form.image_shape) != expected:
            raise UserError(f'--data={self.path}: its images have the shape {list(form.image_shape)}, those of --network={network} '
                            f'{expected} [C,H,W]')
        if form.units != net.units:
            raise UserError(f'--data={self.path}: its units are {form.units or "8-bit"}, those of --network={network} '
                            f'{net.units or "8-bit"}; convert it like the training data')
        if label_dim != net.label_dim:
            raise UserError(f'--data={self.path}: its labels have {label_dim} dimensions, those of --network={network} {net.label_dim}')

    def facts(self) -> dict:
        """What the noisy images depend on: JSON values."""
        c = self.corruption
        return {'data': self.dataset.fingerprint(), 'keep': len(self.dataset), 'noisy': len(self.items),
                'corruption': {key: getattr(c, key) for key in ('sigma', 'probability', 'seed', 'protocol')}}
