# SPDX-License-Identifier: Apache-2.0
"""eval_fid.py compared with independent programs on the same photographs: `python benchmarks/evaluation.py parity`.

Compares with torch-fidelity, clean-fid, prdc and transformers, as far as they can be imported. Each program reads the same files (JPEG
and PNG; as they are, and resized by Pillow's bicubic filter), and Inception has the same weights everywhere: made by a formula, or
--weights."""

import io
import os
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from dnnlib.archive import Archive
from metrics import detectors, frechet, kernel, manifold, scores
from metrics.image_files import ImageFiles
from metrics.statistics import Moments
from tests.support.formula_weights import save_inception_weights
from torch_utils import misc

BATCH = 50
SIDE = 64   # what the photographs are resized to
FEW = 64    # number of features (at most a third of the images), few enough for a covariance of full rank
SEED = 2020
SUBSETS = 20, 50  # subsets of KID, and images per subset (at most half of the images)


class Rows:
    """The table; each row is printed as soon as it is known."""

    def __init__(self):
        self.failed, self.skipped = 0, 0
        self.say('quantity', 'images', 'here', 'there', 'difference', 'tolerance', '')

    @staticmethod
    def say(*cells):
        widths = (48, 10, 16, 16, 12, 11, 0)
        print('  '.join(str(cell).ljust(width) for cell, width in zip(cells, widths)).rstrip(), flush=True)

    def compare(self, quantity, images, ours, theirs, tolerance, relative=True):
        """Prints a row for two numbers or arrays: their largest difference, by default relative to the largest of `theirs`.

        tolerance: of that difference; None where the two programs define the quantity differently."""
        ours, theirs = (np.asarray(value, dtype=np.float64) for value in (ours, theirs))
        error = float(np.abs(ours - theirs).max() / (np.abs(theirs).max() if relative else 1)) if ours.shape == theirs.shape else np.inf
        holds = tolerance is None or error <= tolerance
        self.failed += not holds
        shown = [f'{value:.10g}' if value.ndim == 0 else 'x'.join(map(str, value.shape)) for value in (ours, theirs)]
        verdict = 'other definition' if tolerance is None else 'pass' if holds else 'FAIL'
        self.say(quantity, images, *shown, f'{error:.1e}', '-' if tolerance is None else f'{tolerance:g}', verdict)

    def peer(self, name, function, *args):
        """Prints the rows for another program, if it can be imported."""
        try:
            function(self, *args)
        except ImportError as err:
            self._skip(name, err)
        except RuntimeError as err:  # from a torchvision built for another version of torch
            if 'torchvision' not in str(err):
                raise
            self._skip(name, err)

    def _skip(self, name, err):
        self.skipped += 1
        self.say(f'{name}: skipped ({str(err).splitlines()[0][:80]})')


def parity(args):
    """Prints all rows; returns the exit code."""
    if not args.data:
        sys.exit('parity: pass --data=PATH: a zip or folder of photographs')
    rows = Rows()
    with tempfile.TemporaryDirectory() as folder:
        sets = write_sets(args.data, args.images, folder)
        images = {name: read_images(path) for name, path in sets.items()}
        for name, path in sets.items():
            rows.compare('pixels: Pillow', name, images[name], pillow(path), 0, relative=False)
            rows.peer('torch-fidelity', pixels_of_torch_fidelity, name, path, images[name])
            rows.peer('clean-fid', pixels_of_clean_fid, name, path, images[name])
        weights = args.weights or save_inception_weights(os.path.join(folder, 'weights.pth'))
        rows.peer('transformers', dinov2, images[f'jpeg {SIDE}'][:40], folder)
        inception = detectors.inception_detector('cpu', weights)
        for name in ('jpeg', f'jpeg {SIDE}'):
            found = [torch.cat(parts) for parts in zip(*(inception(batch) for batch in torch.from_numpy(images[name]).split(BATCH)))]
            rows.peer('torch-fidelity', torch_fidelity, name, images[name], *found, weights)
            rows.peer('clean-fid', clean_fid, name, images[name], found[0], inception)
            rows.peer('prdc', prdc, name, found[0])
    print(f'{rows.failed} beyond tolerance, {rows.skipped} skipped')
    return int(rows.failed > 0)


# ----------------------------------------------------------------------------------------------------
# Images


def write_sets(data, count, folder):
    """Writes the first `count` photographs unchanged, as PNG, and resized as PNG and JPEG; returns {name: folder}."""
    archive = Archive(data)
    names = archive.images()[:count]
    sets = {name: os.path.join(folder, name.replace(' ', '-')) for name in ('jpeg', 'png', f'png {SIDE}', f'jpeg {SIDE}')}
    for path in sets.values():
        os.mkdir(path)
    for i, name in enumerate(names):
        content = archive.read(name)
        image = PIL.Image.open(io.BytesIO(content)).convert('RGB')
        larger = image.resize((SIDE, SIDE), PIL.Image.BICUBIC)
        suffix = Path(name).suffix.lower()
        if suffix in ('.jpg', '.jpeg'):
            Path(sets['jpeg'], f'{i:06d}{suffix}').write_bytes(content)
        else:
            image.save(Path(sets['jpeg'], f'{i:06d}.jpg'), quality=90)
        image.save(Path(sets['png'], f'{i:06d}.png'))
        larger.save(Path(sets[f'png {SIDE}'], f'{i:06d}.png'))
        larger.save(Path(sets[f'jpeg {SIDE}'], f'{i:06d}.jpg'), quality=90)
    return sets


def read_images(path):
    """uint8 [N,3,H,W], as eval_fid.py reads them."""
    return torch.cat(list(ImageFiles(path, '--data').batches(BATCH))).numpy()


def files(path):
    return sorted(str(file) for file in Path(path).iterdir())


def pillow(path):
    return np.stack([np.asarray(PIL.Image.open(file).convert('RGB')).transpose(2, 0, 1) for file in files(path)])


def pixels_of_torch_fidelity(rows, name, path, ours):
    from torch_fidelity.datasets import ImagesPathDataset
    dataset = ImagesPathDataset(files(path))
    rows.compare('pixels: torch-fidelity', name, ours, torch.stack([dataset[i] for i in range(len(dataset))]).numpy(), 0, relative=False)


def pixels_of_clean_fid(rows, name, path, ours):
    from cleanfid.utils import ResizeDataset
    dataset = ResizeDataset(files(path), mode='legacy_tensorflow')
    found = (torch.stack([dataset[i] for i in range(len(dataset))]) if len(dataset) else torch.zeros(0)).numpy()
    rows.compare('pixels: clean-fid, legacy_tensorflow', name, ours, found, 1e-4, relative=False)


# ----------------------------------------------------------------------------------------------------
# Features and numbers. The two sets that are compared are the even images and the odd ones.


def halves(features):
    """Float64 features of the even and of the odd images, equally many; in float64 two programs must agree almost exactly."""
    count = len(features) // 2 * 2
    return features[:count:2].double(), features[1:count:2].double()


def frechet_of(a, b):
    found = []
    for part in (a, b):
        moments = Moments(part.shape[1])
        moments.add(part)
        found += [moments.mean.numpy(), moments.covariance().numpy()]
    return frechet.frechet_distance(*found)


def torch_fidelity(rows, name, images, features, logits, weights):
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    net = FeatureExtractorInceptionV3('inception-v3-compat', ['2048', 'logits_unbiased'], feature_extractor_weights_path=weights)
    with torch.no_grad():
        parts = [net(batch) for batch in torch.from_numpy(images).split(BATCH)]
    theirs, their_logits = (torch.cat(found) for found in zip(*parts))
    rows.compare('Inception features: torch-fidelity', name, features, theirs, 1e-5)
    rows.compare('Inception logits: torch-fidelity', name, logits, their_logits, 1e-5)
    a, b = halves(features)
    few = min(FEW, len(a) // 3)
    fid = lambda x, y: metric_fid.fid_statistics_to_metric(*map(metric_fid.fid_features_to_statistics, (x, y)), False)[
        metric_fid.KEY_METRIC_FID]
    rows.compare(f'Fréchet, {few} features: torch-fidelity', name, frechet_of(a[:, :few], b[:, :few]), fid(a[:, :few], b[:, :few]), 1e-9)
    if name == 'jpeg':
        their_distance = fid(*(part.float() for part in halves(theirs)))  # as that program computes it, from its own float32 features
        rows.compare('FID, images to number: torch-fidelity', name, frechet_of(a, b), their_distance, 1e-4)
    count, size = SUBSETS[0], min(SUBSETS[1], len(a) // 2)
    found = metric_kid.kid_features_to_metric(a, b, kid_subsets=count, kid_subset_size=size, rng_seed=SEED, verbose=False)
    ours = kernel.kernel_distance(a, b, count, size, SEED)
    rows.compare('KID: torch-fidelity', name, ours[0], found[metric_kid.KEY_METRIC_KID_MEAN], 1e-9)
    rows.compare('KID, deviation: torch-fidelity', name, ours[1], found[metric_kid.KEY_METRIC_KID_STD], 1e-9)
    found = metric_prc.prc_features_to_metric(b, a, verbose=False, save_cpu_ram=False)  # generated, real
    ours = manifold.precision_recall(a, b)
    for i, key in enumerate((metric_prc.KEY_METRIC_PRECISION, metric_prc.KEY_METRIC_RECALL)):
        rows.compare(f'{key}: torch-fidelity', name, ours[i], found[key], 1e-6)
    found = metric_isc.isc_features_to_metric(logits, 10, True, SEED)
    ours = scores.inception_score(logits, 10, SEED)
    for i, key in enumerate((metric_isc.KEY_METRIC_ISC_MEAN, metric_isc.KEY_METRIC_ISC_STD)):
        rows.compare(f'{key}: torch-fidelity', name, ours[i], found[key], 1e-9)


def clean_fid(rows, name, images, features, inception):
    from cleanfid import fid
    from cleanfid.resize import build_resizer
    a, b = (part.numpy() for part in halves(features))
    few = min(FEW, len(a) // 3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # scipy's warning about an argument
        theirs = fid.fid_from_feats(a[:, :few], b[:, :few])
    rows.compare(f'Fréchet, {few} features: clean-fid', name, frechet_of(*map(torch.from_numpy, (a[:, :few], b[:, :few]))), theirs, 1e-9)
    size = len(a)  # all images: its subsets are drawn from NumPy's global generator
    rows.compare('squared MMD (KID of all images): clean-fid', name, kernel.squared_mmd(a, b),
                 fid.kernel_distance(a, b, num_subsets=1, max_subset_size=size), 1e-9)
    resize = build_resizer('clean')
    large = torch.from_numpy(np.stack([resize(image.transpose(1, 2, 0)).transpose(2, 0, 1) for image in images[:100]]))
    clean = torch.cat([inception(batch)[0] for batch in large.split(BATCH)])  # already 299 x 299, so that nothing is resized again
    ours, theirs = (frechet_of(*(part[:, :few] for part in halves(found))) for found in (features[:100], clean))
    rows.compare(f'Fréchet, {few} features: clean-fid\'s mode "clean"', name, ours, theirs, None)


def prdc(rows, name, features):
    from prdc import compute_prdc
    a, b = halves(features)
    printed, sys.stdout = sys.stdout, io.StringIO()
    try:
        found = compute_prdc(a.numpy(), b.numpy(), nearest_k=5)
    finally:
        sys.stdout = printed
    ours = manifold.manifold_metrics(a, b, pr_k=5, dc_k=5)
    for key in ('precision', 'recall', 'density', 'coverage'):
        rows.compare(f'{key}, k = 5: prdc', name, ours[key], found[key], 1e-9, relative=False)


def dinov2(rows, images, folder):
    """DINOv2 with small random weights, on images resized by Pillow without rounding, as in EDM2, and by transformers' own function."""
    import transformers
    # At 224 pixels, as in use: for other sizes transformers interpolates the position embeddings differently from DINOv2's authors.
    config = transformers.Dinov2Config(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=224, patch_size=14)
    with misc.seeded('parity'):
        net = transformers.Dinov2Model(config).eval()
    path = os.path.join(folder, 'dinov2')
    net.save_pretrained(path)
    ours = detectors.dinov2_detector('cpu', path)(torch.from_numpy(images))[0]
    resized = np.stack([[np.asarray(PIL.Image.fromarray(channel.astype(np.float32)).resize((224, 224), PIL.Image.BICUBIC))
                         for channel in image] for image in images])
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (detectors.DINO_MEAN, detectors.DINO_STD))
    with torch.no_grad():
        theirs = net(pixel_values=torch.from_numpy((resized / 255 - mean) / std).float()).pooler_output
        rows.compare('DINOv2 features: transformers, Pillow', f'jpeg {SIDE}', ours, theirs, 1e-4)
        processor = transformers.BitImageProcessor(size={'height': 224, 'width': 224}, do_center_crop=False, resample=3,
                                                   image_mean=list(detectors.DINO_MEAN), image_std=list(detectors.DINO_STD))
        pixels = processor([PIL.Image.fromarray(image.transpose(1, 2, 0)) for image in images], return_tensors='pt')['pixel_values']
        theirs = net(pixel_values=pixels).pooler_output
        rows.compare('DINOv2 features: transformers, its processor', f'jpeg {SIDE}', ours, theirs, 0.02)
