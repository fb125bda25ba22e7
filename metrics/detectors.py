# SPDX-License-Identifier: Apache-2.0
"""Detectors, which turn images into the features that metrics compare: the FID network, raw pixels, DINOv2, CLIP, VGG-16, and the
user's own."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

import safetensors
import safetensors.torch
import torch

from dnnlib import UserError, hub, one_line
from dnnlib.files import file_digest
from metrics import inception, vgg
from torch_utils import distributed, misc, numerics

PIXELS_MAX_DIM = 4096  # beyond this the covariance of raw pixels is larger than that of Inception's features, and less informative
DINO_SIDE, DINO_MEAN, DINO_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's mean and deviation, of images in [0, 1]
DINO_OFFSET = 0.1  # added to the side in the scale factor by which the published DINOv2 resizes its position embeddings
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of its training images


class Detector:
    """A network and the facts to quote a result with: uint8 [n,C,H,W] -> (features [n,D], logits [n,K] or None).

    Never uses TF32, whatever the rest of the process does. name: recorded in statistics made with it. net: takes uint8 images on
    `device` and returns features, or features and logits. weights, sha256: its file and the file's digest, if any.
    rgb: whether grey images are given to the net as RGB. spatial_dim: if not None, net(images, spatial=True) also returns spatial
    features of this dimension, and so does the detector."""

    tf32 = False

    def __init__(self, name: str, net: Callable, device: torch.device | str, weights: str | os.PathLike | None = None,
                 sha256: str | None = None, rgb: bool = True, max_dim: int | None = None, spatial_dim: int | None = None):
        self.name, self.net, self.device = name, net, torch.device(device)
        self.weights, self.sha256, self.spatial_dim = weights, sha256, spatial_dim
        self._rgb, self._max_dim, self._dims = rgb, max_dim, {}

    def dim(self, shape: Sequence[int]) -> int:
        """Number of features of images [C,H,W]; raises UserError for images that it does not accept."""
        shape = tuple(shape)
        if self._rgb and shape[0] not in (1, 3):
            raise UserError(f'--detector={self.name}: takes 1 or 3 channels, got {shape[0]}; use --detector=pixels')
        if shape not in self._dims:
            self._dims[shape] = self(torch.zeros(1, *shape, dtype=torch.uint8))[0].shape[1]
        if self._max_dim and self._dims[shape] > self._max_dim:
            raise UserError(f'--detector={self.name}: images {list(shape)} have {self._dims[shape]} values each, at most '
                            f'{self._max_dim} are allowed; use --detector=inception')
        return self._dims[shape]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, spatial: bool = False) -> tuple:
        images = images.to(self.device)
        images = images.expand(-1, 3, -1, -1) if self._rgb and images.shape[1] == 1 else images
        with numerics.full_float32():
            if spatial:
                return self.net(images, spatial=True)
            found = self.net(images)
        features, logits = found if isinstance(found, (tuple, list)) and len(found) == 2 else (found, None)
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images):
            got = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise UserError(f'--detector={self.name}: returned {got} for {len(images)} images, expected features [n,D], '
                            'or a pair of features [n,D] and logits [n,K]')
        return features, logits


def inception_detector(device: torch.device | str, weights: str | os.PathLike | None = None, channels_last: bool = False,
                       precision: str = 'fp32', compile: bool = False) -> Detector:
    """The FID network. weights: a local copy of its file, or another URL for it.

    channels_last, compile: faster, with sums in another order. precision: fp32, bf16 or fp16; the last two have their own names and need
    their own statistics."""
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
    return Detector(name, net, device, weights or inception.URL, sha256, spatial_dim=inception.SPATIAL_DIM)


def vgg16_detector(device: torch.device | str, weights: str | os.PathLike | None = None) -> Detector:
    """VGG-16, the 4096 features after the ReLU of its second fully connected layer: precision and recall as in Kynkäänniemi et al. 2019.

    weights: path or URL of torchvision's file, or of another with the same names; .pth or .safetensors."""
    path = vgg.weights_file(weights)
    return Detector('vgg16', vgg.VGG16(path).to(device), device, weights or vgg.URL, file_digest(path))


def pixel_detector(device: torch.device | str) -> Detector:
    """No network: images / 127.5 - 1, flattened; for small images, offline. No logits."""
    return Detector('pixels', lambda images: images.flatten(1).double() / 127.5 - 1, device, rgb=False, max_dim=PIXELS_MAX_DIM)


def torchscript_detector(device: torch.device | str, path: str = '', return_features: bool = False) -> Detector:
    """A TorchScript archive, called as net(uint8 [n,3,H,W]), or as net(images, return_features=True), which NVIDIA's archives need.

    Opening an archive executes the code in it: use only files that you trust."""
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


def module_detector(device: torch.device | str, name: str = '', weights: str | os.PathLike | None = None) -> Detector:
    """Your own class on the Python path, package.module.Class: instantiated without arguments, loaded from a .safetensors file, and called
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


def dinov2_detector(device: torch.device | str, model: str = 'facebook/dinov2-large') -> Detector:
    """DINOv2 from the package transformers: the class token after the last norm, 1024 features for ViT-L/14 (FD_DINOv2).

    model: a Hugging Face name or a local folder of config.json and model.safetensors. Images are resized to 224 x 224 (bicubic with
    antialiasing, neither rounded nor clamped) and normalised like ImageNet's. Stein et al. 2023; Karras et al. 2024."""
    net, file = _transformers_model('dinov2', 'Dinov2Model', model, device)
    _resize_positions(net)
    look = _normalised(DINO_SIDE, DINO_MEAN, DINO_STD, device)
    return Detector('dinov2', lambda images: net(pixel_values=look(images)).pooler_output, device, model, file_digest(file))


def _resize_positions(net):
    """Resizes DINOv2's position embeddings to the grid of 224 x 224 images as its authors' code does, and published distances assume:
    bicubic, with scale factor (side + 0.1) / side of the trained grid. The package's plain ratio gives different features."""
    embeddings = net.embeddings
    positions, patch = embeddings.position_embeddings, net.config.patch_size
    trained, side = round((positions.shape[1] - 1) ** 0.5), DINO_SIDE // patch
    if trained == side:
        return
    grid = positions[:, 1:].reshape(1, trained, trained, -1).permute(0, 3, 1, 2).float()
    scale = (side + DINO_OFFSET) / trained
    grid = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode='bicubic')
    grid = grid.permute(0, 2, 3, 1).reshape(1, side * side, -1).to(positions)
    embeddings.position_embeddings = torch.nn.Parameter(torch.cat([positions[:, :1], grid], dim=1), requires_grad=False)


def clip_detector(device: torch.device | str, model: str = 'openai/clip-vit-large-patch14-336') -> Detector:
    """CLIP's image encoder from the package transformers: embeddings of norm 1, 768 features for ViT-L/14 (CMMD).

    model: a Hugging Face name or a local folder of config.json and model.safetensors or pytorch_model.bin. Images are resized to the
    model's side (336; bicubic with antialiasing) and normalised like CLIP's training images. Jayasumana et al. 2024."""
    net, file = _transformers_model('clip', 'CLIPVisionModelWithProjection', model, device)
    look = _normalised(net.config.image_size, CLIP_MEAN, CLIP_STD, device)
    embed = lambda images: torch.nn.functional.normalize(net(pixel_values=look(images)).image_embeds, dim=1)
    return Detector('clip', embed, device, model, file_digest(file))


def _normalised(side, mean, std, device):
    """uint8 images [n,3,H,W] -> [n,3,side,side], resized and normalised."""
    mean, std = (torch.tensor(values, device=device).reshape(1, 3, 1, 1) for values in (mean, std))

    def look(images):
        x = torch.nn.functional.interpolate(images.float(), (side, side), mode='bicubic', antialias=True)
        return (x - mean * 255) / (std * 255)

    return look


def _transformers_model(detector, kind, model, device):
    """(a model of the package transformers in eval mode, the path of its weights)."""
    try:
        import transformers
    except ImportError:
        raise UserError(f'--detector={detector}: needs the package transformers: pip install transformers') from None
    file = _model_file(model, detector)
    try:
        net = getattr(transformers, kind).from_pretrained(os.path.dirname(file))
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as err:
        raise UserError(f'--detector={detector}:model={model}: {one_line(err)}') from None
    return net.to(device).eval().requires_grad_(False), file


def _model_file(model, detector='dinov2'):
    """Local path of a model's weights, beside its config.json: in the given folder, or in the Hub's cache, downloaded if needed."""
    names, where = WEIGHT_FILES[detector], f'--detector={detector}:model={model}'
    if os.path.isdir(model):
        found = [path for path in (os.path.join(model, name) for name in names) if os.path.isfile(path)]
        if not found:
            raise UserError(f'{where}: has no {" or ".join(names)}')
        return found[0]
    try:
        return hub.fetch(where, names, 'config.json', repo=model)[0]
    except UserError as err:
        raise UserError(f'{err.message}; or download config.json and {names[0]} elsewhere and name their folder: '
                        f'--detector={detector}:model=DIR') from None


def _load_safetensors(net, path):
    where = f'--detector=module: weights={path}'
    if not os.path.isfile(path):
        raise UserError(f'{where}: no such file')
    try:
        net.load_state_dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, RuntimeError, AttributeError) as err:
        raise UserError(f'{where}: {one_line(err)}') from None


def _guarded(net, spec):
    """Wraps the user's own network, so that its errors become one line that names it."""

    def call(images):
        try:
            return net(images)
        except (RuntimeError, TypeError, ValueError) as err:  # inside TorchScript the lines before the last are its trace
            raise UserError(f'--detector={spec}: called with uint8 {list(images.shape)}: {one_line(err, last=True)}') from None

    return call


def _check_precision(precision):
    if precision not in misc.DTYPES:
        raise UserError(f'--detector=inception:precision={precision}: choose from {", ".join(misc.DTYPES)}')


# The published file of CLIP at 336 pixels is a pickle of tensors, which transformers opens with PyTorch's restricted reader.
WEIGHT_FILES = {'dinov2': ('model.safetensors',), 'clip': ('model.safetensors', 'pytorch_model.bin')}

# Functions, so that checking an option loads nothing; each is called with the device.
DETECTORS = {'inception': inception_detector, 'pixels': pixel_detector, 'dinov2': dinov2_detector, 'clip': clip_detector,
             'vgg16': vgg16_detector, 'torchscript': torchscript_detector, 'module': module_detector}
