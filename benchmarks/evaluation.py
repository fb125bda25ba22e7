# SPDX-License-Identifier: Apache-2.0
"""Speed and accuracy of the metrics, compared with other programs: Fréchet distance, Inception features, distances between features.

python benchmarks/evaluation.py frechet
python benchmarks/evaluation.py features [--data=PATH] [--threads=1] [--half] [--compile] [--json=FILE]   (and torch-fidelity)
python benchmarks/evaluation.py distances [--images=50000] [--dim=2048]
python benchmarks/evaluation.py parity --data=PATH [--images=500]   (with torch-fidelity, clean-fid, prdc, transformers: parity.py)"""

import argparse
import importlib.util
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tests  # noqa: E402 (the folder above had to be found first)

tests.__path__ = [str(ROOT / 'tests'), *tests.__path__]  # prdc and others install a package of this name

from benchmarks import measure  # noqa: E402
from benchmarks.parity import parity  # noqa: E402
from metrics import detectors, manifold  # noqa: E402
from metrics.frechet import frechet_distance  # noqa: E402
from metrics.image_files import ImageFiles  # noqa: E402
from metrics.statistics import Moments  # noqa: E402
from tests.support.formula_weights import save_inception_weights  # noqa: E402
from torch_utils import misc  # noqa: E402

BATCH = 50


def skewed_features(count, dim, seed):
    """Skewed, correlated features whose scales differ by up to a factor of a thousand, float64 [count,dim]."""
    rng = np.random.default_rng(seed)
    scale = np.exp(np.random.default_rng(99).standard_normal(dim))
    return np.abs(rng.standard_normal((count, dim)) + 0.3 * rng.standard_normal((count, 1))) * scale


def best_of(function, runs=3):
    """(shortest time in seconds, last result). With one thread it is the CPU time of the process, which other programs hardly affect."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for _ in range(runs):
        start = clock()
        result = function()
        seconds.append(clock() - start)
    return min(seconds), result


def table(title, rows):
    print(title)
    for cells in rows:
        print('  ' + '  '.join(str(cell).ljust(34 if i == 0 else 14) for i, cell in enumerate(cells)).rstrip(), flush=True)


def frechet(args):
    """Times the Fréchet distance of two full-rank statistics, and compares it with scipy's matrix square root."""
    x, y = (skewed_features(3 * args.dim, args.dim, seed) for seed in (0, 1))
    stats = [x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)]

    def by_square_root():
        root = scipy.linalg.sqrtm(stats[1] @ stats[3])
        return np.square(stats[0] - stats[2]).sum() + np.trace(stats[1] + stats[3] - 2 * root.real)

    ours, distance = best_of(lambda: frechet_distance(*stats))
    theirs, expected = best_of(by_square_root, runs=2)
    few = skewed_features(1000, args.dim, 2)
    few = few.mean(0), np.cov(few, rowvar=False)
    seconds, zero = best_of(lambda: frechet_distance(*few, *few))
    table(f'Fréchet distance, {args.dim} dimensions', [
        ('', 'seconds', 'distance'), ('frechet_distance', f'{ours:.2f}', f'{distance:.9g}'),
        ('scipy.linalg.sqrtm', f'{theirs:.2f}', f'{expected:.9g}'), ('ratio', f'{ours / theirs:.3f}', f'{distance / expected - 1:.1e}'),
        ('1,000 samples against themselves', f'{seconds:.2f}', f'{zero:.1e}')])


def features(args):
    """Times the FID network, its variants and, if installed, torch-fidelity's, and prints how much their features change the FID."""
    images = some_images(args)
    with tempfile.TemporaryDirectory() as folder:
        path = args.weights or save_inception_weights(os.path.join(folder, 'weights.pth'))
        nets = {'inception': detectors.inception_detector('cpu', path)}
        for options in args.variants:
            nets['inception:' + ','.join(f'{key}={value}' for key, value in options.items())] = detectors.inception_detector(
                'cpu', path, **options)
        nets = {name: lambda batch, net=net: net(batch)[0] for name, net in nets.items()}
        if importlib.util.find_spec('torch_fidelity'):
            nets['torch-fidelity'] = torch_fidelity_network(path)
        seconds, found = time_in_turns(nets, images)
    plain = found['inception']
    rows, facts = [('', 'seconds', 'images/s', 'features', 'FID', 'mixed FID')], {}
    for name, spent in seconds.items():
        error = float((found[name] - plain).abs().max() / plain.abs().max())
        own, mixed = fid_of_halves(found[name], found[name]), fid_of_halves(found[name], plain)
        rows.append((name, f'{spent:.1f}', f'{args.images / spent:.1f}', f'{error:.1e}', f'{own:.5f}', f'{mixed:.5f}'))
        facts[name] = {'images_per_second': args.images / spent, 'difference': error, 'fid': own, 'mixed_fid': mixed}
    measure.write(args.json, torch.device('cpu'), images=args.images, size=list(images.shape[2:]), detectors=facts)
    table(f'Features of {args.images} images of {images.shape[3]} x {images.shape[2]}, batches of {BATCH}, '
          f'{torch.get_num_threads()} threads; largest relative difference of features; FID between the two halves of the images, '
          'the second half by the same network (FID) or by plain inception (mixed FID)', rows)


def some_images(args):
    """The first images of --data, or random ones."""
    if args.data is None:
        return torch.randint(0, 256, (args.images, 3, args.size, args.size), dtype=torch.uint8, generator=misc.generator('images'))
    return torch.cat(list(ImageFiles(args.data, '--data').batches(BATCH, args.images)))


def time_in_turns(nets, images):
    """{name: seconds}, {name: features}: the networks take turns at each batch, so that a slower moment of the machine affects all."""
    for net in nets.values():
        net(images[:BATCH])  # allocations, and compilation where asked for
    seconds, found = dict.fromkeys(nets, 0.0), {name: [] for name in nets}
    for batch in images.split(BATCH):
        for name, net in nets.items():
            spent, part = best_of(lambda net=net, batch=batch: net(batch), runs=1)
            seconds[name] += spent
            found[name].append(part)
    return seconds, {name: torch.cat(parts) for name, parts in found.items()}


def fid_of_halves(first, second):
    """Fréchet distance between the features of even images in `first` and of odd images in `second`."""
    halves = []
    for found in (first[::2], second[1::2]):
        moments = Moments(found.shape[1])
        moments.add(found)
        halves.append(moments.statistics())
    return frechet_distance(halves[0].mean, halves[0].cov, halves[1].mean, halves[1].cov)


def torch_fidelity_network(path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    net = FeatureExtractorInceptionV3('inception-v3-compat', ['2048'], feature_extractor_weights_path=path)
    return torch.no_grad()(lambda batch: net(batch)[0])


def distances(args):
    """Time and peak memory of precision, recall, density and coverage of two sets of float32 features."""
    sets = [torch.randn(args.images, args.dim, generator=misc.generator('set', i)) for i in range(2)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    seconds, found = best_of(lambda: manifold.manifold_metrics(*sets), runs=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    table(f'Precision, recall, density, coverage: {args.images} x {args.images} x {args.dim}', [
        ('seconds', f'{seconds:.0f}'), ('peak memory of the process', f'{peak:.2f} GiB'),
        ('of which before the call', f'{before:.2f} GiB'), *((name, f'{value:.4f}') for name, value in found.items())])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['frechet', 'features', 'distances', 'parity'])
    parser.add_argument('--images', type=int)
    parser.add_argument('--dim', type=int, default=2048)
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--weights', help='the published Inception file; by default random weights, which take as long')
    parser.add_argument('--data', help='images: folder, zip or array; by default random ones')
    parser.add_argument('--threads', type=int, help='CPU threads; with one, CPU time is measured instead of elapsed time')
    parser.add_argument('--half', action='store_true', help='also time bfloat16')
    parser.add_argument('--compile', action='store_true', help='also time the compiled network')
    parser.add_argument('--json', help='features: also write the numbers to this file')
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    args.images = args.images or {'features': 1000, 'distances': 50000, 'parity': 500}.get(args.what)
    args.variants = [{'channels_last': True}]
    args.variants += [{'precision': 'bf16'}, {'channels_last': True, 'precision': 'bf16'}] if args.half else []
    args.variants += [{'compile': True}] if args.compile else []
    sys.exit({'frechet': frechet, 'features': features, 'distances': distances, 'parity': parity}[args.what](args))


if __name__ == '__main__':
    main()
