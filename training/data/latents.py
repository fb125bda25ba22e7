# SPDX-License-Identifier: Apache-2.0
"""Data sets of latents, which `dataset_tool.py encode` makes of pictures: what their dataset.json tells, and samples of distributions.

Form "mean": a latent is the mean that the autoencoder gives, [C,H,W]. Form "distribution": the means and then the standard deviations,
[2C,H,W]; an image is mean + std * noise, with fresh noise at each visit. xflip: after the latents of all N pictures stand those of the
N mirrored ones, since a mirrored latent is not the latent of a mirrored picture."""

import json
from typing import Any, NamedTuple

import torch

FORMS = ('distribution', 'mean')


class Latents(NamedTuple):
    """"latents" of dataset.json."""

    autoencoder: dict   # {"ref", "range", "sha256"}, see networks/autoencoder.py
    form: str           # one of FORMS
    xflip: bool         # whether there are latents of mirrored pictures
    picture_shape: list  # [C,H,W] of the pictures

    @property
    def distribution(self) -> bool:
        """Whether standard deviations follow the means."""
        return self.form == 'distribution'

    def words(self) -> str:
        """In words, for people."""
        sha256 = str(self.autoencoder.get('sha256') or 'unknown')
        return (f'of {self.autoencoder["ref"]} (sha256 {sha256[:12]}), {self.form}, of pictures '
                f'{" x ".join(map(str, self.picture_shape))}{", and of mirrored ones" * self.xflip}')


def read_latents(value: Any, shape: tuple, count: int) -> Latents | None:
    """The checked "latents" of dataset.json, None where there are none. shape, count: of the stored images. Raises ValueError."""
    if value is None:
        return None
    shown = json.dumps(value)[:100]
    if not isinstance(value, dict) or value.keys() != {*Latents._fields}:
        raise ValueError(f'"latents" that are not an object of {", ".join(Latents._fields)}: {shown}')
    found = Latents(**value)
    picture = found.picture_shape
    if not isinstance(found.autoencoder, dict) or not isinstance(found.autoencoder.get('ref'), str):
        raise ValueError(f'"latents" whose autoencoder has no "ref": {shown}')
    if found.form not in FORMS or not isinstance(found.xflip, bool):
        raise ValueError(f'"latents" whose form is not {" or ".join(FORMS)}, or whose xflip is not true or false: {shown}')
    if not isinstance(picture, list) or len(picture) != 3 or not all(type(side) is int and side > 0 for side in picture):
        raise ValueError(f'"latents" whose picture_shape is not [C,H,W]: {shown}')
    if found.distribution and shape[0] % 2 or found.xflip and count % 2:
        raise ValueError(f'"latents" of the form {found.form}{" with xflip" * found.xflip}, and {count} images of {shape[0]} channels')
    return found


def sample(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """mean + std * noise of a distribution [N,2C,H,W], with unit normal noise [N,C,H,W]."""
    mean, std = images.chunk(2, dim=1)
    return torch.addcmul(mean, std, noise)
