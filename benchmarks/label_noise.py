# SPDX-License-Identifier: Apache-2.0
"""Slight condition corruption on digits: wrong labels (--label-corruption) and perturbed label embeddings (--cep) in training.

python benchmarks/label_noise.py --out=runs/label-noise --json=label_noise.json --png=docs/figures/label_noise.png

Every cell is one train.py, its samples and their figures; cells that are finished are not run again."""

import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from scipy.special import entr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dnnlib.figures import figure  # noqa: E402 (the folder above had to be found first)
from dnnlib.files import read_json, write_json  # noqa: E402
from metrics.frechet import frechet_distance  # noqa: E402
from metrics.manifold import precision_recall  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402
from training.data.dataset import ImageDataset  # noqa: E402

CLASSES, SAMPLES, MOST, STEPS = 10, 1000, 2000, 9  # generated images, as many of each class, and at most; sampling steps (17 evaluations)
COMPONENTS = 16  # principal components of the training digits in which classes are compared: 85 % of their variance
CLEAN = 'none'
ARMS = {CLEAN: []} | {f'labels {rate:g}': [f'--label-corruption={rate}'] for rate in (0.025, 0.05, 0.1, 0.2, 0.4)} \
    | {f'CEP-G {gamma:g}': [f'--cep=gaussian:gamma={gamma}'] for gamma in (1, 4)}
SETS = {'all': (899, list(ARMS)), 'few': (200, [CLEAN, 'labels 0.1', 'CEP-G 1', 'CEP-G 4'])}  # training images, arms
TRAIN = ['--cond=1', '--arch=ddpmpp:cbase=16,cres=1|2,blocks=1,attn=4,dropout=0', '--augment=0', '--sigma-data=0.75', '--batch=64',
         '--lr=0.004', '--lr-rampup=0.004', '--ema=0.008', '--snap=1000', '--dump=0', '--samples=0', '--threads=1']
FIGURES = {  # what is measured: (title, format)
    'fid_score': ('Fréchet distance', '.4g'), 'per_class': ('of each class', '.4g'), 'precision': ('precision', '.3f'),
    'recall': ('recall', '.3f'), 'accuracy': ('class as asked', '.3f'), 'marginal': ('H(class)', '.4f'),
    'conditional': ('H(class given x)', '.3f'), 'within': ('H(x given class)', '+.2f'), 'held_out': ('held-out loss', '.4g')}


def call(script, *arguments):
    """Runs a command of the program in this process, silently."""
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(script).main([*map(str, arguments)], script, standalone_mode=False)


def make_data(path):
    """Writes the training digits and the held-out ones, the held-out ones' statistics, and a label for each seed."""
    for name, more in [('all', ['--part=0/2']), ('few', ['--part=0/2', f'--max-images={SETS["few"][0]}', '--sample=spread']),
                       ('held-out', ['--part=1/2'])]:
        if not os.path.exists(path(f'{name}.zip')):
            call('dataset_tool', '--source=digits', f'--dest={path(f"{name}.zip")}', *more)
    if not os.path.exists(path('held-out.npz')):
        call('eval_fid', 'ref', f'--data={path("held-out.zip")}', f'--dest={path("held-out.npz")}', '--detector=pixels', '--keep-features')
    np.save(path('labels.npy'), np.arange(MOST) % CLASSES)


def pictures(path):
    """(values [N, 64] in [-1, 1], classes [N]) of a set of digits."""
    dataset = ImageDataset(path, use_labels=True)
    values = np.stack([dataset.decode(i) for i in dataset.raw_idx]).reshape(len(dataset), -1)
    return values / 127.5 - 1, dataset.classes


class Judge:
    """A classifier of digits, trained on the held-out ones, and the principal components of the training ones."""

    def __init__(self, path):
        from sklearn.linear_model import LogisticRegression  # only this benchmark and the digits need it

        self.held_out, self.classes = pictures(path('held-out.zip'))
        train, classes = pictures(path('all.zip'))
        self.classifier = LogisticRegression(C=0.3, max_iter=1000).fit(self.held_out, self.classes)
        self.train, self.train_classes = train, classes
        self.mean = train.mean(0)
        self.axes = np.linalg.svd(train - self.mean, full_matrices=False)[2][:COMPONENTS].T

    def real(self):
        """The figures of the training digits themselves, with their own classes."""
        statistics = lambda values: (values.mean(0), np.cov(values, rowvar=False))
        precision, recall = precision_recall(self.held_out, self.train)
        return {'fid_score': frechet_distance(*statistics(self.train), *statistics(self.held_out)), 'precision': precision,
                'recall': recall} | self(self.train, self.train_classes)

    def parts(self, values, classes):
        """[(mean, covariance)] of each class in the principal components."""
        values = (values - self.mean) @ self.axes
        return [(part.mean(0), np.cov(part, rowvar=False)) for part in (values[classes == c] for c in range(CLASSES))]

    def __call__(self, values, asked):
        """Figures of samples [N, 64] of the classes `asked` [N]; entropies in nats.

        marginal: H of the mean of p(class given x), the entropy of predicted classes; conditional: the mean of its H; within: entropy
        of the Gaussian of each class, mean over classes, less that of the held-out digits; per_class: mean Fréchet distance of them."""
        given = self.classifier.predict_proba(values)
        own, real = self.parts(values, asked), self.parts(self.held_out, self.classes)
        volume = lambda parts: np.mean([np.linalg.slogdet(cov)[1] / 2 for _, cov in parts])
        return {'accuracy': float((given.argmax(1) == asked).mean()), 'marginal': float(entr(given.mean(0)).sum()),
                'conditional': float(entr(given).sum(1).mean()), 'within': float(volume(own) - volume(real)),
                'per_class': float(np.mean([frechet_distance(*a, *b) for a, b in zip(own, real)]))}


def train(path, images, arm, seed, kimg):
    """Trains one cell in a process of its own; returns its snapshot and its held-out loss."""
    run = path(f'{images}-{arm.replace(" ", "-")}-{seed}-{kimg:g}')
    if not os.path.exists(os.path.join(run, 'done')):
        shutil.rmtree(run, ignore_errors=True)  # of a training that was stopped
        command = ['train.py', f'--outdir={run}', '--nosubdir', f'--data={path(f"{images}.zip")}', f'--val={path("held-out.zip")}', *TRAIN,
                   *ARMS[arm], f'--seed={seed}', f'--corruption-seed={seed}', f'--duration={kimg / 1e3}', f'--tick={kimg / 4}']
        done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], capture_output=True, text=True,
                              env={**os.environ, 'OMP_NUM_THREADS': '1'})
        if done.returncode:
            raise SystemExit(f'{" ".join(command)}\n{done.stdout}\n{done.stderr}')
        Path(run, 'done').touch()
    lines = [json.loads(line) for line in Path(run, 'stats.jsonl').read_text().splitlines()]
    network = next(entry.path for entry in os.scandir(run) if entry.name.startswith('network-snapshot'))
    return network, functools.reduce(lambda a, b: a | b, lines)['Val/clean']


def judge(path, judges, network, samples):
    """{figure: value} of a network's samples."""
    folder, result = os.path.join(os.path.dirname(network), 'samples'), os.path.join(os.path.dirname(network), 'fid.json')
    call('generate', f'--network={network}', f'--outdir={folder}', f'--seeds=0-{samples - 1}', f'--labels={path("labels.npy")}',
         f'--steps={STEPS}', '--threads=1', '--skip-existing')
    call('eval_fid', f'--gen-path={folder}', f'--ref-stats={path("held-out.npz")}', '--detector=pixels', '--metrics=fid,pr',
         f'--num={samples}', f'--out-path={result}')
    found = read_json(result)
    files = sorted(Path(folder).rglob('*.png'))[:samples]
    values = np.stack([np.asarray(Image.open(file), np.float64).reshape(-1) for file in files]) / 127.5 - 1
    asked = np.array([int(file.stem) for file in files]) % CLASSES
    return {name: found[name] for name in ('fid_score', 'precision', 'recall')} | judges(values, asked)


def mean(values, form='.4g'):
    """"mean ± standard error"."""
    values = np.asarray(values)
    return f'{values.mean():{form}} ± {values.std(ddof=1) / len(values) ** 0.5:.2g}' if len(values) > 1 else f'{values.mean():{form}}'


def print_table(images, cells):
    """One line an arm: all figures, and the change of the Fréchet distance against clean training of the same seed."""
    titles = ' | '.join(title for title, _ in FIGURES.values())
    click.echo(f'\n{SETS[images][0]} training images\n\n| arm | {titles} | Fréchet, same seed |')
    click.echo('| --- ' * (len(FIGURES) + 2) + '|')
    clean = cells[CLEAN]
    for arm, seeds in cells.items():
        cells_of = [mean([one[name] for one in seeds.values()], form) for name, (_, form) in FIGURES.items()]
        change = [100 * (one['fid_score'] / clean[seed]['fid_score'] - 1) for seed, one in seeds.items() if seed in clean]
        click.echo(f'| {arm} | {" | ".join(cells_of)} | {"" if arm == CLEAN else mean(change, "+.1f") + " %"} |')


def draw(results, path):
    """A row for each training set: figures against the rate of wrong labels and against gamma; points are seeds, lines means."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    shown = ('fid_score', 'recall', 'within', 'accuracy')
    with figure(path, '--png', len(results), len(shown), (4 * len(shown), 3.2 * len(results))) as (_, axes):
        for row, (images, cells) in zip(axes, results.items()):
            for axis, name in zip(row, shown):
                for kind, marker in (('labels', 'o'), ('CEP-G', 'x')):
                    arms = [CLEAN, *(arm for arm in cells if arm.startswith(kind))]
                    amount = [0.0 if arm == CLEAN else float(arm.split()[1]) for arm in arms]
                    amount = [x * (10 if kind == 'labels' else 1) for x in amount]
                    points = [[one[name] for one in cells[arm].values()] for arm in arms]
                    colour = axis.plot(amount, [np.mean(ys) for ys in points], label=kind)[0].get_color()
                    for x, ys in zip(amount, points):
                        axis.plot([x] * len(ys), ys, marker, color=colour, markersize=4)
                axis.set(title=f'{FIGURES[name][0]}, {SETS[images][0]} images', xlabel='10 x share of wrong labels, or gamma')
                axis.grid(alpha=0.3)
        axes[0][0].legend(fontsize=8)


@click.command(cls=Command)
@click.option('--out', required=True, help='Folder of data and runs; what is there is not made again')
@click.option('--sets', default=','.join(SETS), show_default=True, help='Training sets: all has 899 digits, few 200')
@click.option('--arms', default=','.join(ARMS), help='Names of the arms, separated by commas')
@click.option('--seeds', default=3, show_default=True, help='Number of seeds')
@click.option('--kimg', default=40.0, show_default=True, help='Training length in thousands of images')
@click.option('--images', 'samples', type=click.IntRange(max=MOST), default=SAMPLES, show_default=True, help='Generated images')
@click.option('--json', 'dest', metavar='FILE', help='Write the figures of every cell to this file')
@click.option('--png', metavar='FILE', help='Write the figure to this file')
@version_option
def main(out, sets, arms, seeds, kimg, samples, dest, png):
    """Train class-conditional digits with wrong labels and perturbed embeddings, and compare the samples with held-out digits."""
    torch.set_num_threads(1)
    os.makedirs(out, exist_ok=True)
    path, arms = functools.partial(os.path.join, out), {CLEAN, *arms.split(',')}
    make_data(path)
    judges, results = Judge(path), {images: {arm: {} for arm in SETS[images][1] if arm in arms} for images in sets.split(',')}
    for seed, images, arm in [(seed, images, arm) for seed in range(seeds) for images, own in results.items() for arm in own]:
        network, held_out = train(path, images, arm, seed, kimg)
        kept = os.path.join(os.path.dirname(network), f'figures-{samples}.json')
        if not os.path.exists(kept):
            write_json(kept, judge(path, judges, network, samples) | {'held_out': held_out})
        results[images][arm][seed] = read_json(kept)
    real = judges.real()
    click.echo('The training digits themselves: ' + ', '.join(f'{title} {real[name]:{form}}' for name, (title, form) in FIGURES.items()
                                                              if name in real))
    for images, cells in results.items():
        print_table(images, cells)
    if dest:
        write_json(dest, {'train': TRAIN, 'kimg': kimg, 'samples': samples, 'training_digits': real, 'cells': results})
    if png:
        draw(results, png)


if __name__ == '__main__':
    main()
