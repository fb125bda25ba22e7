# SPDX-License-Identifier: Apache-2.0
"""Autoencoders between pictures and latents (Rombach et al. 2022): AutoencoderKL of diffusers, or one that is registered here.

A latent is normal given its picture: mean + std * noise. Latents here are as the autoencoder gives them; units map them to those of a
network."""

import json
import os
import re

import torch

from dnnlib import UserError, hub, one_line
from dnnlib.files import file_digest, read_json
from torch_utils import distributed, misc, numerics

# What an autoencoder takes and gives: factor and offset from [0, 1] to its pixels. "0..1" is that of EDM2, whose latents therefore have
# other statistics than those of Stable Diffusion's own programs, "-1..1".
RANGES = {'-1..1': (2.0, -1.0), '0..1': (1.0, 0.0)}
KEYS = ('ref', 'sha256', 'range')  # of "autoencoder" in config.json and dataset.json
FILE_NAME, FOLDER = 'diffusion_pytorch_model.safetensors', 'vae'
PIXELS = {'cpu': 2 ** 19, 'cuda': 2 ** 20}  # at most, of the pictures that are processed together


class Autoencoder:
    """An autoencoder. A class of your own has the attributes and the methods moments() and reconstruct(), and a line
    AUTOENCODERS['name'] = TheClass; then name:REF names it, and it is called with (ref, device).

    image_channels, channels: of pictures and of latents. factor: pixels of a picture, in each direction, for one of a latent.
    sha256: hexadecimal digest of its weights. device: where it computes."""

    image_channels, channels, factor, sha256, device = 3, 4, 8, '', torch.device('cpu')

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [N,C,H,W] float32 -> (mean, std) of their latents, [N,channels,H/factor,W/factor] each."""
        raise NotImplementedError

    def reconstruct(self, z: torch.Tensor) -> torch.Tensor:
        """Latents -> pictures, float32 [N,C,H,W], not clipped."""
        raise NotImplementedError


class KL(Autoencoder):
    """AutoencoderKL of diffusers: a folder of config.json and diffusion_pytorch_model.safetensors, or such a folder's or repository's
    subfolder "vae"."""

    def __init__(self, ref: str, device: torch.device | str = 'cpu') -> None:
        kind = _diffusers_class(ref)
        folder = _folder(ref)
        path = os.path.join(folder, FILE_NAME)
        name = read_json(os.path.join(folder, 'config.json')).get('_class_name')
        if name not in (None, 'AutoencoderKL'):
            raise UserError(f'{ref}: config.json is of the class {json.dumps(name)[:60]}; an autoencoder has AutoencoderKL')
        try:
            self.vae, found = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False,
                                                   torch_dtype=torch.float32, output_loading_info=True)
        except Exception as err:  # whatever the package raises for a damaged or foreign file
            raise UserError(f'{ref}: cannot be opened as an AutoencoderKL: {one_line(err)}') from None
        wrong = [f'{key} {problem}' for what, problem in (('missing_keys', 'is missing'), ('unexpected_keys', 'is unknown'))
                 for key in sorted(found.get(what) or ())]
        if wrong or found.get('mismatched_keys'):
            raise UserError(f'{ref}: the weights do not fit config.json: {"; ".join(wrong[:3]) or "shapes differ"}')
        self.vae = self.vae.to(device).eval().requires_grad_(False)
        self.device, self.sha256 = torch.device(device), file_digest(path)
        config = self.vae.config
        self.image_channels, self.channels = config.in_channels, config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.vae.encode(x.to(self.device)).latent_dist
        return found.mean, found.std

    def reconstruct(self, z: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(z.to(self.device)).sample


def _diffusers_class(ref):
    try:
        import diffusers
    except ImportError:
        raise UserError(f'{ref}: opening an AutoencoderKL needs the package diffusers: pip install diffusers') from None
    diffusers.utils.logging.set_verbosity_error()
    return diffusers.AutoencoderKL


def _folder(ref):
    """The local folder of config.json and weights that a reference names. Raises UserError."""
    if os.path.isdir(ref):
        for folder in (ref, os.path.join(ref, FOLDER)):
            if all(os.path.isfile(os.path.join(folder, name)) for name in ('config.json', FILE_NAME)):
                return folder
        raise UserError(f'{ref}: has no config.json and {FILE_NAME}, nor a folder "{FOLDER}" that has them')
    match = re.fullmatch(r'(?P<repo>[\w.-]+/[\w.-]+)(?P<inner>(?:/[\w.-]+)*)(?:@(?P<revision>\S+))?', ref)
    if not match:
        raise UserError(f'{ref}: no such folder, and not a Hugging Face name, owner/name[/folder][@revision]')
    inner = match['inner'].lstrip('/')
    names = [f'{inner}/{name}' if inner else name for name in ('config.json', FILE_NAME)]
    return os.path.dirname(hub.fetch(ref, *names, repo=match['repo'], revision=match['revision'])[0])


def open_autoencoder(ref: str, device: torch.device | str = 'cpu', sha256: str | None = None) -> Autoencoder:
    """The autoencoder that a reference names, in eval mode: REF or kl:REF of diffusers, NAME:REF of another class in AUTOENCODERS.

    sha256: the digest that its weights must have, if it is known. Under torchrun every rank calls this. Raises UserError."""
    kind, colon, rest = ref.partition(':')
    kind, name = (AUTOENCODERS[kind], rest) if colon and kind in AUTOENCODERS else (KL, ref)
    found = distributed.first_on_node(kind, name, device)
    if sha256 is not None and found.sha256 != sha256:
        raise UserError(f'{ref}: the autoencoder has weights of sha256 {found.sha256[:12]}..., and the latents are of one with '
                        f'{sha256[:12]}...; name that one')
    return found


def described(value: object) -> dict:
    """A checked "autoencoder" of config.json or dataset.json: {"ref", "range", and "sha256" unless unknown}. Raises ValueError."""
    shown = json.dumps(value)[:100]
    if not isinstance(value, dict) or value.keys() - {*KEYS} or not isinstance(value.get('ref'), str) or not value['ref']:
        raise ValueError(f'must be an object of "ref", "range" and "sha256", got {shown}')
    if value.get('range') not in [*RANGES]:
        raise ValueError(f'needs a "range" of {" or ".join(RANGES)}, got {shown}')
    sha256 = value.get('sha256')
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch(r'[0-9a-f]{64}', sha256)):
        raise ValueError(f'has a "sha256" that is not 64 hexadecimal digits: {shown}')
    return {key: value[key] for key in KEYS if value.get(key) is not None}


class Coder:
    """An autoencoder with the range of its pixels: pictures to latents and back, in chunks of rows that fit in memory.

    described: {"ref", "range", "sha256"}, as in config.json."""

    def __init__(self, autoencoder: Autoencoder, ref: str, range: str = '-1..1') -> None:
        self.autoencoder, self.range = autoencoder, range
        self.channels, self.factor, self.image_channels = autoencoder.channels, autoencoder.factor, autoencoder.image_channels
        self.described = {'ref': ref, 'range': range, 'sha256': autoencoder.sha256}

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, std) of the latents of pictures uint8 [N,C,H,W], float32 on the CPU."""
        factor, offset = RANGES[self.range]
        run = lambda part: torch.cat(self.autoencoder.moments(part.float().div(255).mul(factor).add(offset)), dim=1).float().cpu()
        return self._in_chunks(run, images, images.shape[2] * images.shape[3]).chunk(2, dim=1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of latents [N,channels,h,w], clipped to [0, 1], float32 on the latents' device."""
        factor, offset = RANGES[self.range]
        run = lambda part: self.autoencoder.reconstruct(part.float()).float().to(latents.device).sub(offset).div(factor).clamp(0, 1)
        return self._in_chunks(run, latents, latents.shape[2] * latents.shape[3] * self.factor ** 2)

    def as_uint8(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures in [0, 1] as grey levels: rounded, or cut off for "0..1", as the programs do whose ranges these are."""
        return (pictures * 255 + (0.5 if self.range == '-1..1' else 0.0)).clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def _in_chunks(self, run, x, pixels):
        """run(x) in chunks of equal size, which depends on the size of a picture only: on the CPU results depend on it."""
        on_cpu = self.autoencoder.device.type == 'cpu'
        rows = min(max(1, PIXELS['cpu' if on_cpu else 'cuda'] // pixels), misc.CPU_ROWS[0] if on_cpu else len(x))
        with numerics.full_float32():
            return torch.cat([run(x[part])[:count] for part, count in misc.chunks(len(x), x.device, rows)])


def open_coder(description: dict, device: torch.device | str = 'cpu') -> Coder:
    """The Coder of a checked "autoencoder" of config.json. Under torchrun every rank calls this. Raises UserError."""
    found = open_autoencoder(description['ref'], device, description.get('sha256'))
    return Coder(found, description['ref'], description['range'])


# By the name in NAME:REF: called with (ref, device).
AUTOENCODERS = {'kl': KL}
