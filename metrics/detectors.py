# SPDX-License-Identifier: Apache-2.0
"""Detectors: what turns images into the features that metrics compare. The FID network, raw pixels, DINOv2, and the user's own."""

import importlib
import os
import sys

import safetensors
import safetensors.torch
import torch

from dnnlib import UserError, hub, one_line
from dnnlib.files import file_digest
from metrics import inception
from torch_utils import distributed, misc

PIXELS_MAX_DIM = 4096  # above this the covariance of raw pixels is larger than that of Inception's features, and says less
DINO_SIDE, DINO_MEAN, DINO_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's mean and deviation, of images in [0, 1]


class Detector:
    """A network and the facts that a result must be quoted with: uint8 [n,C,H,W] -> (features [n,D], logits [n,K] or None).

    No TF32, whatever the process multiplies in elsewhere. name: what statistics made with it are marked with. net: takes uint8 images on
    `device` and returns features, or features and logits. weights, sha256: the file behind it and its digest, where there is one.
    rgb: whether grey images are shown to the net as RGB."""

    tf32 = False

    def __init__(self, name, net, device, weights=None, sha256=None, rgb=True, max_dim=None):
        self.name, self.net, self.device = name, net, torch.device(device)
        self.weights, self.sha256 = weights, sha256
        self._rgb, self._max_dim, self._dims = rgb, max_dim, {}

    def dim(self, shape):
        """Number of features of images [C,H,W]; raises UserError for images it cannot take."""
        shape = tuple(shape)
        if self._rgb and shape[0] not in (1, 3):
            raise UserError(f'--detector={self.name}: takes 1 or 3 channels, got {shape[0]}; use --detector=pixels')
        if shape not in self._dims:
            self._dims[shape] = self(torch.zeros(1, *shape, dtype=torch.uint8))[0].shape[1]
        if self._max_dim and self._dims[shape] > self._max_dim:
            raise UserError(f'--detector={self.name}: images {list(shape)} have {self._dims[shape]} numbers each, allowed '
                            f'are {self._max_dim}; use --detector=inception')
        return self._dims[shape]

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device)
        with misc.full_float32():
            found = self.net(images.expand(-1, 3, -1, -1) if self._rgb and images.shape[1] == 1 else images)
        features, logits = found if isinstance(found, (tuple, list)) and len(found) == 2 else (found, None)
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images):
            got = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise UserError(f'--detector={self.name}: returned {got} for {len(images)} images, expected features [n,D], '
                            'or a pair of features [n,D] and logits [n,K]')
        return features, logits


def inception_detector(device, weights=None, channels_last=False, precision='fp32', compile=False):
    """The FID network. weights: local copy of its file, or another address for it.

    channels_last, compile: other orders of the same sums. precision: fp32, bf16 or fp16, which has a name, and statistics, of its own."""
    _check_precision(precision)
    path = inception.weights_file(weights)
    net, sha256 = inception.Inception(path).to(device), file_digest(path)
    if not sha256.startswith(inception.SHA256):
        distributed.print0(f'Warning: {weights} is not the published Inception file: its numbers cannot be compared with published ones',
                           file=sys.stderr)
    net.compute_dtype = misc.DTYPES[precision]
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    if compile:
        net.trunk = torch.compile(net.trunk)
    name = 'inception' if precision == 'fp32' else f'inception:precision={precision}'
    return Detector(name, net, device, weights or inception.URL, sha256)


def pixel_detector(device):
    """No network: images / 127.5 - 1, flattened; for small images, offline. It has no logits."""
    return Detector('pixels', lambda images: images.flatten(1).double() / 127.5 - 1, device, rgb=False, max_dim=PIXELS_MAX_DIM)


def torchscript_detector(device, path='', return_features=False):
    """A TorchScript archive, called as net(uint8 [n,3,H,W]), or as net(images, return_features=True), which NVIDIA's archives want.

    Opening one executes the code in it: take only files that you trust."""
    if not path:
        raise UserError('--detector=torchscript: name the archive, --detector=torchscript:path=FILE')
    if not os.path.isfile(path):
        raise UserError(f'--detector=torchscript:path={path}: no such file')
    try:
        net = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as err:
        raise UserError(f'--detector=torchscript:path={path}: not a TorchScript archive ({one_line(err)})') from None
    call = (lambda images: net(images, return_features=True)) if return_features else net
    return Detector('torchscript', _guarded(call, f'torchscript:path={path}'), device, path, file_digest(path))


def module_detector(device, name='', weights=None):
    """Your own class on the Python path, package.module.Class: made without arguments, filled from a .safetensors file, and called
    with uint8 [n,3,H,W]. The code that you name is imported and executed."""
    module, _, attribute = name.rpartition('.')
    where = f'--detector=module:name={name}'
    if not module:
        raise UserError(f'{where}: name a class as package.module.Class')
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as err:
        raise UserError(f'{where}: {one_line(err)}; is its folder on PYTHONPATH?') from None
    if weights is not None:
        _load_safetensors(made, weights)
    if isinstance(made, torch.nn.Module):
        made = made.to(device).eval().requires_grad_(False)
    return Detector(f'module:{name}', _guarded(made, f'module:name={name}'), device, weights, weights and file_digest(weights))


def dinov2_detector(device, model='facebook/dinov2-large'):
    """DINOv2 through the package transformers: the class token after the last norm, 1024 numbers for ViT-L/14 (FD_DINOv2).

    model: a Hugging Face name or a local folder of config.json and model.safetensors. Images are resized to 224 x 224 (bicubic, with a
    filter) and normalised as ImageNet's are. Stein et al. 2023; Karras et al. 2024."""
    try:
        import transformers
    except ImportError:
        raise UserError('--detector=dinov2: needs the package transformers: pip install transformers') from None
    folder = _model_folder(model)
    try:
        net = transformers.Dinov2Model.from_pretrained(folder).to(device).eval().requires_grad_(False)
    except (OSError, ValueError, safetensors.SafetensorError) as err:
        raise UserError(f'--detector=dinov2:model={model}: {one_line(err)}') from None
    mean, std = (torch.tensor(values, device=device).reshape(1, 3, 1, 1) for values in (DINO_MEAN, DINO_STD))

    def features(images):
        x = torch.nn.functional.interpolate(images.float(), (DINO_SIDE, DINO_SIDE), mode='bicubic', antialias=True)
        return net(pixel_values=(x / 255 - mean) / std).pooler_output

    return Detector('dinov2', features, device, model, file_digest(os.path.join(folder, 'model.safetensors')))


def _model_folder(model):
    """Local folder of a model: the given one, or the Hub's cache, filled where it is not."""
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, 'model.safetensors')):
            raise UserError(f'--detector=dinov2:model={model}: has no model.safetensors')
        return model
    try:
        return os.path.dirname(hub.fetch(f'--detector=dinov2:model={model}', 'model.safetensors', 'config.json', repo=model)[0])
    except UserError as err:
        raise UserError(f'{err.message}; or fetch config.json and model.safetensors elsewhere and name their folder: '
                        '--detector=dinov2:model=DIR') from None


def _load_safetensors(net, path):
    where = f'--detector=module: weights={path}'
    if not os.path.isfile(path):
        raise UserError(f'{where}: no such file')
    try:
        net.load_state_dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, RuntimeError, AttributeError) as err:
        raise UserError(f'{where}: {one_line(err)}') from None


def _guarded(net, spec):
    """The user's own network, whose failures are one line that names it."""

    def call(images):
        try:
            return net(images)
        except (RuntimeError, TypeError, ValueError) as err:  # inside TorchScript the lines before the last are its trace
            raise UserError(f'--detector={spec}: called with uint8 {list(images.shape)}: {one_line(err, last=True)}') from None

    return call


def _check_precision(precision):
    if precision not in misc.DTYPES:
        raise UserError(f'--detector=inception:precision={precision}: choose from {", ".join(misc.DTYPES)}')


# Functions, so that checking an option loads nothing; each takes the device when it is called.
DETECTORS = {'inception': inception_detector, 'pixels': pixel_detector, 'dinov2': dinov2_detector,
             'torchscript': torchscript_detector, 'module': module_detector}
