# SPDX-License-Identifier: Apache-2.0
"""A detector for photographs too small for the Inception network: a classifier, trained here on labelled images, whose last features are
compared.

python benchmarks/small_detector.py --data=labelled.zip --val=reference.zip --dest=small.safetensors

Then --detector=module:name=benchmarks.small_detector.SmallClassifier,weights=small.safetensors for eval_fid.py."""

import sys
from pathlib import Path

import click
import numpy as np
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib import UserError  # noqa: E402 (the folder above had to be found first)
from dnnlib.files import file_digest, replacing  # noqa: E402
from torch_utils import misc  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402
from training.data.dataset import ImageDataset  # noqa: E402

CLASSES, WIDTHS = 10, (32, 64)  # channels at full and at half resolution
FEATURES = WIDTHS[-1]
BATCH, LR, DECAY, SHIFT = 128, 4e-3, 0.05, 1  # SHIFT: pixels by which training images are moved at most


class SmallClassifier(torch.nn.Module):
    """uint8 [n,3,H,W] -> (features [n,64], logits [n,10]); four 3x3 convolutions, mean pooling, one linear layer."""

    def __init__(self):
        super().__init__()
        narrow, wide = WIDTHS
        sizes = [(3, narrow), (narrow, narrow), (narrow, wide), (wide, wide)]
        self.convolutions = torch.nn.ModuleList(torch.nn.Conv2d(a, b, 3, padding=1) for a, b in sizes)
        self.norms = torch.nn.ModuleList(torch.nn.GroupNorm(8, b) for _, b in sizes)
        self.logits = torch.nn.Linear(wide, CLASSES)

    def forward(self, images):
        x = images.float() / 127.5 - 1
        for k, (convolution, norm) in enumerate(zip(self.convolutions, self.norms)):
            x = torch.nn.functional.silu(norm(convolution(x)))
            x = torch.nn.functional.avg_pool2d(x, 2) if k == 1 else x
        features = x.mean([2, 3])
        return features, self.logits(features)


def labelled(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a data set, uint8 [N,3,H,W], and their classes, int64 [N]."""
    dataset = ImageDataset(path, use_labels=True)
    if dataset.is_float or dataset.image_shape[0] not in (1, 3):
        raise UserError(f'{path}: the detector is trained on 8-bit grey or RGB images')
    labels = np.asarray(dataset.labels(np.arange(len(dataset))))
    if labels.ndim != 2 or labels.shape[1] > CLASSES:
        raise UserError(f'{path}: labels of shape {list(labels.shape[1:])}; the detector is trained on at most {CLASSES} classes')
    images = torch.from_numpy(np.stack([dataset.decode(index) for index in dataset.raw_idx]))
    return images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels.argmax(1))


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every image [n,C,H,W] moved by up to SHIFT pixels along each axis; the edge is repeated."""
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images.float(), [SHIFT] * 4, mode='replicate')
    rows, columns = (torch.randint(2 * SHIFT + 1, [len(images), 1], generator=generator) + torch.arange(size) for size in (height, width))
    which = torch.arange(len(images))[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(images: torch.Tensor, classes: torch.Tensor, epochs: int, seed: int = 0, mirror: bool = False) -> SmallClassifier:
    """A classifier trained on uint8 images [N,3,H,W]; mirror: on their mirror images too."""
    with misc.seeded('small detector', seed):
        net = SmallClassifier()
    generator = misc.generator(seed, 'small detector batches')
    steps = epochs * max(len(images) // BATCH, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(images), [BATCH], generator=generator)
        batch = shifted(images[rows], generator)
        if mirror:
            batch = torch.where(torch.rand([BATCH, 1, 1, 1], generator=generator) < 0.5, batch.flip(3), batch)
        loss = torch.nn.functional.cross_entropy(net(batch)[1], classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: SmallClassifier, images: torch.Tensor, classes: torch.Tensor) -> float:
    """Share of images that get their own class."""
    found = torch.cat([net(part)[1].argmax(1) for part in images.split(1024)])
    return float((found == classes).double().mean())


@click.command(cls=Command)
@click.option('--data', required=True, metavar='PATH', help='Labelled images to train on, as dataset_tool.py writes them')
@click.option('--val', required=True, metavar='PATH', help='Other labelled images, to measure the accuracy on')
@click.option('--dest', required=True, metavar='FILE', help='File for the weights, a .safetensors')
@click.option('--kimg', default=300.0, show_default=True, help='Length of the training in thousand images')
@click.option('--mirror', is_flag=True, help='Also train on mirrored images (photographs, not digits)')
@click.option('--seed', default=0, show_default=True, help='Random seed')
@version_option
def main(data, val, dest, kimg, mirror, seed):
    """Train the classifier, write its weights, and print its accuracy on held-out images and the file's SHA-256."""
    if not dest.endswith('.safetensors'):
        raise UserError(f'--dest={dest}: must end in .safetensors')
    images, classes = labelled(data)
    held_out = labelled(val)
    if images.shape[1:] != held_out[0].shape[1:]:
        raise UserError(f'--val={val}: images of shape {list(held_out[0].shape[1:])}, those of --data have {list(images.shape[1:])}')
    net = train(images, classes, max(round(kimg * 1e3 / len(images)), 1), seed, mirror)
    with replacing(dest) as part:
        safetensors.torch.save_file(net.state_dict(), part)
    print(f'{dest}: trained on {len(images)} images, accuracy {accuracy(net, *held_out):.3f} on {len(held_out[0])} held-out images, '
          f'sha256 {file_digest(dest)}')


if __name__ == '__main__':
    main()
