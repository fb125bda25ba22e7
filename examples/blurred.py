# SPDX-License-Identifier: Apache-2.0
"""A tenth of the images clean, the others blurred by an unknown amount: measured, annotated and trained on, in minutes on two CPU cores.

python examples/blurred.py --outdir=blurred

Five ways to use such data, with several seeds, and how far the samples of each are from other clean images (docs/annotate.md)."""

import os
import sys
import time

import click
import numpy as np
import scipy.ndimage

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from benchmarks.price import call, snapshot  # noqa: E402 (the checkout need not be installed)
from dnnlib.files import read_json, write_json  # noqa: E402
from examples.demo import first_images, write_comparison  # noqa: E402
from torch_utils import misc  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402
from training.data.dataset import ImageDataset  # noqa: E402

COUNT, CLEAN = 898, 90  # half of the 1,797 digits, and how many of them are clean
TRAIN = ['--arch=ddpmpp:cbase=16,cres=1|2,blocks=1,attn=4,dropout=0', '--sigma-data=0.75', '--batch=64', '--lr=4e-3', '--lr-rampup=0.003',
         '--ema=0.003', '--augment=0', '--pairing=sigma_first', '--snap=1000000', '--dump=1000000', '--samples=0', '--threads=1']
SAMPLING = ['--steps=12', '--sigma-min=0.02', '--sigma-max=20', '--threads=1']
DETECTORS = {'pixels': 'pixels', 'features': 'module:name=benchmarks.small_detector.SmallClassifier,weights={folder}/small.safetensors'}
ARMS = {'blurred': 'the blurred images themselves', 'alone': 'trained on the clean tenth alone',
        'mixed': 'trained on all as if they were clean', 'annotated': 'trained on all, the blurred ones annotated',
        'clean': 'trained on all, all of them clean'}


class Example:
    """The folder of the example: data, runs and distances; what is there is not made again."""

    def __init__(self, outdir: str, blur: float, method: list[str], kimg: float, samples: int):
        self.outdir, self.blur, self.method, self.kimg, self.samples = os.path.abspath(outdir), blur, method, kimg, samples
        os.makedirs(self.outdir, exist_ok=True)

    def path(self, name: str) -> str:
        return os.path.join(self.outdir, name)

    def detector(self, name: str) -> str:
        return f'--detector={DETECTORS[name].format(folder=self.outdir)}'

    def prepare(self) -> None:
        """The two halves of the digits, a small classifier of them, and the statistics of the second half."""
        if os.path.exists(self.path('reference-features.npz')):
            return
        halves = [('dataset_tool', ['--source=digits', f'--dest={self.path(name)}.zip', f'--part={part}/2', f'--max-images={COUNT}',
                                    '--sheet=none']) for part, name in enumerate(['train', 'reference'])]
        detector = ('benchmarks.small_detector', [f'--data={self.path("train.zip")}', f'--val={self.path("reference.zip")}',
                                                  f'--dest={self.path("small.safetensors")}', '--kimg=60'])
        references = [('eval_fid', ['ref', f'--data={self.path("reference.zip")}', f'--dest={self.path(f"reference-{name}.npz")}',
                                    self.detector(name)]) for name in DETECTORS]
        print(call(*halves, detector, *references), flush=True)

    def divide(self, seed: int) -> None:
        """The data of a seed: clean.zip and blurred.zip, which is annotated; both together, without and with the annotation."""
        folder = self.path(f's{seed}')
        if os.path.exists(os.path.join(folder, 'annotated.zip')):
            return
        os.makedirs(folder, exist_ok=True)
        train = ImageDataset(self.path('train.zip'))
        images = np.concatenate([train.decode(row) for row in train.raw_idx])  # uint8 [N,8,8]
        chosen = np.random.default_rng(misc.seed_of(seed, 'clean images')).permutation(COUNT)
        clean, others = images[np.sort(chosen[:CLEAN])], images[np.sort(chosen[CLEAN:])]
        blurred = np.uint8(np.rint(scipy.ndimage.gaussian_filter(np.float64(others), (0, self.blur, self.blur))))
        place = lambda name: os.path.join(folder, name)
        convert = lambda dest, *sources: ('dataset_tool', [*(f'--source={place(source)}' for source in sources), f'--dest={place(dest)}',
                                                           '--sheet=none'])
        np.savez(place('clean.npz'), images=clean)
        np.savez(place('blurred.npz'), images=blurred)
        print(call(convert('clean.zip', 'clean.npz'), convert('blurred.zip', 'blurred.npz'),
                   convert('mixed.zip', 'clean.zip', 'blurred.zip'),
                   ('dataset_tool', ['annotate', f'--clean={place("clean.zip")}', f'--data={place("blurred.zip")}', *self.method,
                                     f'--dest={place("measured.zip")}', f'--seed={seed}']),
                   convert('annotated.zip', 'clean.zip', 'measured.zip')), flush=True)

    def data(self, arm: str, seed: int) -> str:
        """What an arm is trained on, or, for the blurred images themselves, what is compared."""
        return self.path('train.zip') if arm == 'clean' else self.path(f's{seed}/{ {"alone": "clean"}.get(arm, arm) }.zip')

    def images(self, arm: str, seed: int) -> str:
        return self.data(arm, seed) if arm == 'blurred' else self.path(f's{seed}/{arm}-samples')

    def run(self, arm: str, seed: int) -> dict:
        """{detector: Fréchet distance} of an arm, trained with this seed."""
        result = self.path(f's{seed}/{arm}.json')
        if os.path.exists(result):
            return read_json(result)
        run, images, commands = self.path(f's{seed}/{arm}'), self.images(arm, seed), []
        if arm != 'blurred' and snapshot(run) is None:
            call(('train', [f'--outdir={run}', '--nosubdir', '--resume=latest', f'--data={self.data(arm, seed)}', *TRAIN, f'--seed={seed}',
                            f'--duration={self.kimg / 1e3:g}', f'--tick={self.kimg / 4:g}']))
        if arm != 'blurred':
            commands = [('generate', [f'--network={snapshot(run)}', f'--outdir={images}', f'--seeds=0-{self.samples - 1}', *SAMPLING])]
        count = self.samples if commands else COUNT - CLEAN
        files = {name: self.path(f's{seed}/{arm}-{name}.json') for name in DETECTORS}
        call(*commands, *(('eval_fid', [f'--gen-path={images}', f'--ref-stats={self.path(f"reference-{name}.npz")}', f'--num={count}',
                                        self.detector(name), f'--out-path={file}']) for name, file in files.items()))
        write_json(result, {name: read_json(file)['fid_score'] for name, file in files.items()})
        return read_json(result)


@click.command(cls=Command)
@click.option('--outdir', default='blurred', show_default=True, metavar='DIR', help='Folder for everything that is written')
@click.option('--blur', default=0.6, show_default=True, metavar='PIXELS', help='Std of the blur, which the program is not told')
@click.option('--method', default='--method=spectral', show_default=True, metavar='OPTIONS', help='Options of dataset_tool.py annotate')
@click.option('--seeds', default=3, show_default=True, metavar='INT', help='Number of seeds: of the clean tenth and of the training')
@click.option('--kimg', default=24.0, show_default=True, metavar='FLOAT', help='Length of each training in thousand images')
@click.option('--samples', default=1000, show_default=True, metavar='INT', help='Generated images of each network')
@version_option
def main(outdir: str, blur: float, method: str, seeds: int, kimg: float, samples: int) -> None:
    """Train on digits of which nine tenths are blurred, in five ways, and compare the samples with other clean digits."""
    start = time.time()
    example = Example(outdir, blur, method.split(), kimg, samples)
    example.prepare()
    found = {}
    cells = [(arm, seed) for arms in (('blurred', 'alone', 'annotated'), ('mixed', 'clean')) for seed in range(seeds) for arm in arms]
    for arm, seed in cells:
        example.divide(seed)
        found.setdefault(arm, []).append(example.run(arm, seed))
        print(f'seed {seed}, {ARMS[arm]}: ' + ', '.join(f'{name} {value:.3f}' for name, value in found[arm][-1].items()), flush=True)
    write_json(example.path('distances.json'), found)
    write_comparison(example.path('samples.png'), [(title, first_images(example.images(arm, 0))) for title, arm in (
        ('blurred', 'blurred'), ('clean tenth alone', 'alone'), ('all as if clean', 'mixed'), ('annotated', 'annotated'))])
    print(f'\nFréchet distance to the other half of the digits, mean and standard deviation of {seeds} seeds:\n'
          f'  {"":<46}' + ''.join(f'{name:>16}' for name in DETECTORS))
    for arm in ARMS:
        distances = found[arm]
        columns = [[one[name] for one in distances] for name in DETECTORS]
        print(f'  {ARMS[arm]:<46}' + ''.join(f'{np.mean(values):10.2f} ({np.std(values):.2f})' for values in columns))
    print(f'\nSamples: {example.path("samples.png")}\nTook {(time.time() - start) / 60:.1f} minutes.')


if __name__ == '__main__':
    main()
