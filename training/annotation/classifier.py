# SPDX-License-Identifier: Apache-2.0
"""A classifier of noisy images, clean or imperfect: the encoder of the U-Net, a mean over pixels, and one linear layer (Daras et al. 2025,
arXiv 2506.10038, with EDM's input scale and embedding of the level).

Its training sees as many clean images as imperfect ones at every level, so that its output estimates p / (p + q) at that level."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from dnnlib import UserError
from dnnlib.progress import Progress
from torch_utils import misc, registry
from training.annotation.sets import images_of
from training.data.dataset import ImageDataset
from training.diffusion.ambient import add_noise, column
from training.networks.interface import Arch
from training.networks.layers import Linear
from training.networks.unet import SongUNet

SIGMA_DATA = 0.5
DECAY = 0.05  # weight decay
HELD = 2 ** 32  # bytes of images, at most, that are kept decoded


class HalfUNet(SongUNet):
    """Encoder of DDPM++: (x [N,C,H,W], noise_labels [N]) -> logits [N] of P(clean)."""

    def __init__(self, img_resolution: int | Sequence[int], in_channels: int, model_channels: int = 64,
                 channel_mult: Sequence[int] = (1, 2), num_blocks: int = 2, attn_resolutions: Sequence[int] = (16,),
                 dropout: float = 0.1) -> None:
        super().__init__(img_resolution, in_channels, in_channels, model_channels=model_channels, channel_mult=channel_mult,
                         num_blocks=num_blocks, attn_resolutions=attn_resolutions, dropout=dropout)
        del self.dec
        self.logit = Linear(self.channels[-1], 1, init_mode='xavier_uniform', init_weight=1e-5)

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor) -> torch.Tensor:
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(self.map_noise(noise_labels)))))
        x, dtype = self.enter(x)
        return self.logit(self._encode(x, emb, dtype)[-1].mean([2, 3]))[:, 0]


ENCODERS = {'half_unet': Arch(HalfUNet)}


class Recipe(NamedTuple):
    """How a classifier is trained. arch: of ENCODERS; kimg: thousand images, of both kinds; batch; lr: the highest, reached after a tenth
    of the training and then lowered to 0; seed; device."""

    arch: str
    kimg: float
    batch: int
    lr: float
    seed: int = 0
    device: torch.device | str = 'cpu'


def build(arch: str, shape: Sequence[int], seed: int, fold: int) -> HalfUNet:
    """A network for images [C,H,W] with initial weights of this key. Raises UserError."""
    settings = registry.build(arch, ENCODERS, '--arch')()
    settings.pop('model_type')
    with misc.seeded(seed, 'annotate', 'weights', fold):
        try:
            return HalfUNet(list(shape[1:]), shape[0], **settings)
        except ValueError as err:
            raise UserError(f'--arch={arch}: {err}') from None


def logits(net: HalfUNet, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Logits of P(clean) [N] of noisy images [N,C,H,W] at levels sigma [N]."""
    scale = (column(sigma, x).square() + SIGMA_DATA ** 2).rsqrt()
    return net(x * scale, sigma.log().to(x) / 4)


def reader(dataset: ImageDataset) -> Callable[[np.ndarray], torch.Tensor]:
    """A function: rows -> images in network units, float32 [n,C,H,W]; all images are kept as stored where they are not too large."""
    size = math.prod(dataset.image_shape) * (4 if dataset.is_float else 1)
    if size * len(dataset) > HELD:
        return lambda rows: images_of(dataset, rows)
    held = np.stack([dataset.decode(row) for row in dataset.raw_idx])
    return lambda rows: dataset.to_network(held[rows])


def train(clean: Callable, data: Callable, rows: tuple[np.ndarray, np.ndarray], native: np.ndarray, span: tuple[float, float],
          shape: Sequence[int], recipe: Recipe, fold: int = 0) -> HalfUNet:
    """A classifier trained on these rows (of the clean images, of the others), which are drawn with equal probability.

    clean, data: readers. native: std of the noise that the other images carry, [N]. span: lowest and highest level; ln sigma is uniform
    between them, and each level has one clean image and one of the others."""
    net = build(recipe.arch, shape, recipe.seed, fold).to(recipe.device).train()
    half = max(recipe.batch // 2, 1)
    steps = max(round(recipe.kimg * 1e3 / (2 * half)), 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=max(steps, 2), pct_start=0.1)
    targets = torch.cat([torch.ones(half), torch.zeros(half)]).to(recipe.device)
    levels = torch.tensor(span, dtype=torch.float64).log()
    with Progress(steps * 2 * half, f'Training classifier {fold}') as bar, misc.seeded(recipe.seed, 'annotate', 'dropout', fold,
                                                                                      device=recipe.device):
        for step in range(steps):
            source = misc.generator(recipe.seed, 'annotate', 'training', fold, step)
            first, second = (part[torch.randint(len(part), [half], generator=source).numpy()] for part in rows)
            carried = torch.from_numpy(native[second])
            low = torch.maximum(levels[0], carried.clamp(min=1e-12).log())
            sigma = (low + (levels[1] - low) * torch.rand([half], generator=source, dtype=torch.float64)).exp()
            images = torch.cat([clean(first), data(second)])
            noise = torch.randn(images.shape, generator=source)
            x = add_noise(images, torch.cat([torch.zeros_like(carried), carried]), sigma.repeat(2), noise)
            found = logits(net, x.to(recipe.device), sigma.repeat(2).float().to(recipe.device))
            loss = F.binary_cross_entropy_with_logits(found, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(2 * half)
    return net.eval()


@torch.no_grad()
def label(net: HalfUNet, read: Callable, rows: np.ndarray, native: np.ndarray, levels: np.ndarray, *, name: str, seed: int = 0,
          draws: int = 1, batch: int = 1024, device: torch.device | str = 'cpu') -> np.ndarray:
    """Logits of P(clean) of images at all levels, float32 [n, L, draws].

    The noise of an image depends on seed, name and row alone. batch: noisy images that a GPU evaluates together; a CPU takes those of one
    image, since its results depend on how many it takes."""
    levels = torch.from_numpy(np.repeat(levels, draws))
    per_call = max(batch // len(levels), 1) if torch.device(device).type != 'cpu' else 1
    out = np.empty([len(rows), len(levels)], np.float32)
    with Progress(len(rows), 'Labelling') as bar:
        for start in range(0, len(rows), per_call):
            part = rows[start:start + per_call]
            images = read(part)
            noise = torch.stack([torch.randn([len(levels), *images.shape[1:]], generator=misc.generator(seed, 'annotate', name, int(row)))
                                 for row in part])
            sigma, carried = levels.repeat(len(part)), torch.from_numpy(native[part]).repeat_interleave(len(levels))
            x = add_noise(images.repeat_interleave(len(levels), 0), torch.minimum(carried, sigma), sigma, noise.flatten(0, 1))
            found = logits(net, x.to(device), sigma.float().to(device))
            out[start:start + per_call] = found.float().cpu().numpy().reshape(len(part), -1)
            bar.update(len(part))
    return out.reshape(len(rows), -1, draws)
