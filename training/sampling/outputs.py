# SPDX-License-Identifier: Apache-2.0
"""What becomes of sampled images [N,C,H,W] in network units: they stay as they are, or are latents and decoded to pictures.

Both kinds: call(images) -> images as the other methods take them; shape [C,H,W] and units of these; is_picture, whether they can be PNGs;
uint8(images), for PNGs and detectors; numbers(images), float32 as .npy files hold them, counts where the data is stabilised counts;
pictures(images), NumPy uint8 to look at; read(array), of a file of one image, its inverse; facts(), for records."""

import numpy as np
import torch

from dnnlib import UserError
from training.networks.autoencoder import Coder, open_coder
from training.sampling import pixels
from training.sampling.generate import network_device, resolution


class Plain:
    """Images as the network makes them, in its units."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.shape, self.units, self._latents = [net.img_channels, *resolution(net)], net.units, getattr(net, 'autoencoder', None)
        self.is_picture = pixels.is_picture(net.img_channels, net.units) and not self._latents

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def uint8(self, images: torch.Tensor) -> torch.Tensor:
        return pixels.to_uint8(images)

    def numbers(self, images: torch.Tensor) -> torch.Tensor:
        return pixels.to_values(images, self.units).float()

    def pictures(self, images: torch.Tensor) -> np.ndarray:
        return pixels.pictures(images, self.units)

    def read(self, array: np.ndarray) -> torch.Tensor:
        return pixels.to_network(array, self.units)

    def facts(self) -> dict:
        return {'image_shape': self.shape, **({'units': self.units} if self.units is not None else {}),
                **({'autoencoder': self._latents, 'decoded': False} if self._latents else {})}


class Decoded:
    """Pictures in [0, 1], float32, decoded from latents. coder: a networks.autoencoder.Coder."""

    is_picture, units = True, None

    def __init__(self, net: torch.nn.Module, coder: Coder) -> None:
        if coder.channels != net.img_channels:
            raise UserError(f'--decode: the latents of {coder.described["ref"]} have {coder.channels} channels, those of the network '
                            f'{net.img_channels}')
        height, width = resolution(net)
        self.coder, self._units = coder, net.units
        self.shape = [coder.image_channels, height * coder.factor, width * coder.factor]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.coder.decode(pixels.to_physical(images, self._units).float())

    def uint8(self, images: torch.Tensor) -> torch.Tensor:
        return self.coder.as_uint8(images)

    def numbers(self, images: torch.Tensor) -> torch.Tensor:
        return images * 2 - 1

    def pictures(self, images: torch.Tensor) -> np.ndarray:
        return self.uint8(images).cpu().numpy()

    def read(self, array: np.ndarray) -> torch.Tensor:
        array = torch.as_tensor(array)
        # A quarter of a grey level more, so that rounding in float32 does not change the level again.
        return (array.float() + 0.25) / 255 if array.dtype == torch.uint8 else (array.float() + 1) / 2

    def facts(self) -> dict:
        return {'image_shape': self.shape, 'autoencoder': self.coder.described, 'decoded': True}


Output = Plain | Decoded


def open_output(net: torch.nn.Module, decode: str = 'auto', device: torch.device | str | None = None) -> Output:
    """The output of a network's images. decode: "auto", what its configuration says; "none": latents stay latents; or another place of its
    autoencoder, a reference as of open_autoencoder. Under torchrun every rank calls this. Raises UserError."""
    description = getattr(net, 'autoencoder', None)
    if description is None and decode not in ('auto', 'none'):
        raise UserError(f'--decode={decode}: the network makes images, not latents; leave the option out')
    if description is None or decode == 'none':
        return Plain(net)
    try:
        coder = open_coder(description if decode == 'auto' else {**description, 'ref': decode}, device or network_device(net))
    except UserError as err:
        hint = 'the network makes latents of it; name another place of it with --decode=REF, or write latents with --decode=none'
        raise UserError(f'--decode={decode}: {err.message} ({hint})') from None
    return Decoded(net, coder)
