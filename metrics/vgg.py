# SPDX-License-Identifier: Apache-2.0
"""VGG-16 (Simonyan and Zisserman 2015): features of its second fully connected layer, with which precision and recall were published."""

import os

import safetensors
import safetensors.torch
import torch

from dnnlib import UserError, one_line
from dnnlib.download import published_file
from torch_utils import checkpoint

URL = 'https://download.pytorch.org/models/vgg16-397923af.pth'
SHA256 = '397923af'  # its first digits
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of images in [0, 1]
WIDTHS = (64, 64, 'pool', 128, 128, 'pool', 256, 256, 256, 'pool', 512, 512, 512, 'pool', 512, 512, 512, 'pool')
HIDDEN = 4096


class VGG16(torch.nn.Module):
    """uint8 images [N,3,H,W] -> features [N,4096], float32: the second fully connected layer after its ReLU (Kynkäänniemi et al. 2019).

    Images are resized to 224 x 224 (bilinear with antialiasing) and normalised like ImageNet's. weights: path of a state dict with
    torchvision's names, a .safetensors or a torch.save file; the last layer, classifier.6, may be present and is not used.
    Raises UserError if the file holds something else."""

    def __init__(self, weights: str | os.PathLike):
        super().__init__()
        with torch.device('meta'):  # takes no memory and no random numbers; the state dict's tensors become the parameters
            self.features, self.classifier = layers()
        self.load_state_dict(_read_weights(weights, self.state_dict()), assign=True)
        self.eval().requires_grad_(False)
        for name, values in (('mean', MEAN), ('std', STD)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.interpolate(images.float() / 255, (SIDE, SIDE), mode='bilinear', antialias=True)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            x = self.features((x - self.mean) / self.std)
        return self.classifier(x.flatten(1))


def layers() -> tuple[torch.nn.Sequential, torch.nn.Sequential]:
    """(convolutions, fully connected layers up to the second), numbered as torchvision numbers them."""
    found, channels = [], 3
    for width in WIDTHS:
        if width == 'pool':
            found.append(torch.nn.MaxPool2d(2))
            continue
        found += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU(inplace=True)]
        channels = width
    classifier = torch.nn.Sequential(  # dropout, inactive here, only keeps the numbering
        torch.nn.Linear(channels * 7 * 7, HIDDEN), torch.nn.ReLU(inplace=True), torch.nn.Dropout(),
        torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU(inplace=True))
    return torch.nn.Sequential(*found), classifier


def weights_file(weights: str | os.PathLike | None = None) -> str:
    """Local path of the weights: torchvision's public file, downloaded once and checked, or the given path or URL."""
    return published_file(URL, SHA256, weights, '--detector=vgg16:weights=PATH')


def _read_weights(path, expected):
    """The tensors of the network from the file, after a check of their names and shapes."""
    where = f'--detector=vgg16:weights={path}'
    if str(path).endswith('.safetensors'):
        try:
            state = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as err:
            raise UserError(f'{where}: {one_line(err)}') from None
    else:
        state = checkpoint.read_tensors(path, 'weights', option='--detector=vgg16:weights=')
    held = lambda key: state.get(key) if isinstance(state, dict) else None
    wrong = next((key for key in expected if getattr(held(key), 'shape', None) != expected[key].shape), None)
    if wrong:
        raise UserError(f'{where}: not a VGG-16 with torchvision\'s names: "{wrong}" is missing or has the wrong shape')
    return {key: state[key].float() for key in expected}
