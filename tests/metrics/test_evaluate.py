# SPDX-License-Identifier: Apache-2.0
"""From images to numbers: detectors, the one pass over the images, references, ranks."""

import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file

from dnnlib import UserError
from metrics import detectors, evaluate, image_files
from metrics.kernel import kernel_distance
from metrics.manifold import density_coverage, precision_recall
from metrics.scores import inception_score
from metrics.statistics import Statistics, load_statistics, save_statistics
from tests.support import GOLDEN, ROOT, launch
from tests.support.formula_weights import batch_of, save_inception_weights
from torch_utils import registry

DATA = GOLDEN
SETTINGS = evaluate.Settings(kid_subsets=3, kid_subset_size=10, splits=4)
ANYWHERE = tuple(name for name, metric in evaluate.METRICS.items() if metric.detector is None)  # with any detector


class Toy:
    """A detector with logits that costs nothing."""

    name, sha256, device = 'toy', None, 'cpu'

    def dim(self, shape):
        return 4

    def __call__(self, images):
        x = images.flatten(1)[:, :4].float() / 40
        return x, x * torch.tensor([1., -1, 0.5, 2])


class Lookup(Toy):
    """A detector of one-pixel images that looks their features and logits up."""

    def __init__(self, features, logits=None):
        self.features, self.logits = features, logits

    def dim(self, shape):
        return self.features.shape[1]

    def __call__(self, images):
        index = images.flatten().long()
        return self.features[index], None if self.logits is None else self.logits[index]


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return save_inception_weights(tmp_path_factory.mktemp('inception') / 'weights.pth')


def reference_of(images, detector=None):
    """Statistics, with features, of an array of images."""
    return evaluate.collect([images], detector or Toy(), keep_features=True).statistics


# One pass


def test_numbers_are_those_of_the_functions():
    """All metrics together, from batches, against each function on the features at once."""
    ours, theirs = batch_of(23), batch_of(31, seed=1) // 2
    found = evaluate.evaluate_batches(np.split(ours, [4, 9]), Toy(), reference_of(theirs), ANYWHERE, SETTINGS)
    (x, logits), (y, _) = Toy()(torch.from_numpy(ours)), Toy()(torch.from_numpy(theirs))
    assert (found['kid'], found['kid_std']) == pytest.approx(kernel_distance(x, y, 3, 10, 2020), rel=1e-12)
    assert (found['precision'], found['recall']) == precision_recall(y, x)
    assert (found['density'], found['coverage']) == pytest.approx(density_coverage(y, x), rel=1e-12)
    assert (found['inception_score_mean'], found['inception_score_std']) == pytest.approx(inception_score(logits, 4, 2020), rel=1e-12)
    assert found['inception_score'] == pytest.approx(inception_score(logits, 1)[0], rel=1e-12)
    assert found['fid_score'] > 0
    assert list(found) == ['fid_score', 'fid_inf', 'kid', 'kid_std', 'inception_score', 'inception_score_mean', 'inception_score_std',
                           'precision', 'recall', 'density', 'coverage']


@pytest.mark.parametrize('name, keys', [('fid', {'fid_score'}), ('kid', {'kid', 'kid_std'}), ('pr', {'precision', 'recall'}),
                                        ('dc', {'density', 'coverage'})])
def test_each_metric_alone(name, keys):
    reference = reference_of(batch_of(31, seed=1))
    all_of_them = evaluate.evaluate_batches([batch_of(23)], Toy(), reference, ANYWHERE, SETTINGS)
    alone = evaluate.evaluate_batches([batch_of(23)], Toy(), reference, (name,), SETTINGS)
    assert alone == {key: all_of_them[key] for key in keys}


def test_golden_scores_from_batches():
    """Kernel distance and Inception score of torch-fidelity, by way of images, batches and float32 features."""
    golden, facts = load_file(DATA / 'metrics' / 'metrics.safetensors'), json.loads((DATA / 'metrics' / 'metrics.json').read_text())
    features, logits = torch.from_numpy(golden['feat1']), torch.from_numpy(golden['isc.logits'])
    pixels = np.arange(200, dtype=np.uint8).reshape(-1, 1, 1, 1)
    reference = reference_of(pixels[:130], Lookup(torch.from_numpy(golden['feat2'])))
    found = evaluate.evaluate_batches(np.split(pixels[:150], [3, 90]), Lookup(features), reference, ('kid', 'pr', 'dc'),
                                      evaluate.Settings(10, 100))
    assert found['kid'] == pytest.approx(facts['kernel']['kid0']['kernel_inception_distance_mean'], rel=1e-6)
    assert found['kid_std'] == pytest.approx(facts['kernel']['kid0']['kernel_inception_distance_std'], rel=1e-6)
    assert found['precision'] == pytest.approx(facts['manifold']['prdc_k3']['precision'], rel=1e-12)
    assert found['density'] == pytest.approx(facts['manifold']['prdc_k5']['density'], rel=1e-12)
    found = evaluate.evaluate_batches(np.split(pixels, [3, 90]), Lookup(torch.zeros(200, 1), logits), None, ('is',))
    assert found['inception_score_mean'] == pytest.approx(facts['inception_score']['isc0']['inception_score_mean'], rel=1e-9)
    assert found['inception_score_std'] == pytest.approx(facts['inception_score']['isc0']['inception_score_std'], rel=1e-9)
    assert found['inception_score'] == pytest.approx(facts['inception_score']['isc2']['inception_score_mean'], rel=1e-9)


@pytest.mark.parametrize('make', [Toy, lambda: detectors.pixel_detector('cpu')], ids=['toy', 'pixels'])
def test_batch_size_changes_nothing(make):
    images, reference = batch_of(37), reference_of(batch_of(40, seed=1), make())
    results = [evaluate.evaluate_batches(np.split(images, range(size, 37, size)), make(), reference, ANYWHERE, SETTINGS)
               for size in (1, 5, 37)]
    assert (results[0]['inception_score'] is None) == (make().name == 'pixels')
    for other in results[1:]:
        assert {k: v for k, v in other.items() if v is not None} == pytest.approx(
            {k: v for k, v in results[0].items() if v is not None}, rel=1e-9)


def test_inception_batch_size_changes_nothing(weights, capsys):
    detector = detectors.inception_detector('cpu', weights)
    assert 'not the published' in capsys.readouterr().err
    images, settings = batch_of(6, (3, 16, 16)), evaluate.Settings(2, 4, splits=2)
    reference = reference_of(batch_of(7, (3, 16, 16), seed=1), detector)
    first, second = (evaluate.evaluate_batches(np.split(images, cuts), detector, reference, ('fid', 'kid', 'is', 'pr'), settings)
                     for cuts in ([], [1, 3]))
    # A deviation over splits is made of differences: here 1e-6 beside scores of 1. Logits that are rounded by 8e-7 and
    # spread by 0.006 over the images move a score, and so the deviation, by less than the product.
    before, after = (found.pop('inception_score_std') for found in (first, second))
    assert after == pytest.approx(before, rel=0, abs=5e-9)
    assert second == pytest.approx(first, rel=1e-6)
    same = evaluate.collect([images], detector)
    assert abs(evaluate.numbers(same, same.statistics)['fid_score']) < 1e-6


def test_collect_refuses_other_arrays():
    for batches, message in [([], 'no images'), ([batch_of(2).astype(np.float32)], 'must be uint8'),
                             ([batch_of(2), batch_of(2, (3, 4, 5))], 'earlier ones')]:
        with pytest.raises(UserError, match=message):
            evaluate.collect(batches, detectors.pixel_detector('cpu'))


@pytest.mark.parametrize('metrics, message', [
    (('kid',), '--metrics=kid: subsets of 10 images requested, but a set has only 3; pass --kid-subset-size'),
    (('fid', 'pr'), '--metrics=fid,pr: 3 nearest neighbours requested, only 2 available'), (('is',), '--splits=4: 4 splits requested')])
def test_too_few_images(metrics, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluate.evaluate_batches([batch_of(3)], Toy(), reference_of(batch_of(20)), metrics, SETTINGS)
    assert '\n' not in caught.value.message


# References


def test_reference_of_another_detector_or_size():
    pixels = detectors.pixel_detector('cpu')
    good = Statistics(np.zeros(48), np.eye(48), detector='pixels', shape=(3, 4, 4))
    evaluate.check_reference(good, pixels, (3, 4, 4), 'r')
    evaluate.check_reference(Statistics(np.zeros(48), np.eye(48)), pixels, (3, 4, 4), 'r')
    for reference, shape, message in [
            (Statistics(np.zeros(48), np.eye(48), detector='inception'), (3, 4, 4), '--detector=inception'),
            (good, (3, 5, 5), '48 dimensions, these images have 75'), (good, (3, 2, 8), r'made from \[3, 4, 4\]')]:
        with pytest.raises(UserError, match=message):
            evaluate.check_reference(reference, pixels, shape, 'r')
    with pytest.raises(UserError, match='r: --metrics=kid compare single images.*--keep-features.*--ref-path'):
        evaluate.check_reference(good, pixels, (3, 4, 4), 'r', ('kid',))
    toy = Toy()
    toy.sha256 = 'a' * 64
    with pytest.raises(UserError, match='bbbbbbbb, not aaaaaaaa'):
        other = Statistics(np.zeros(4), np.eye(4), detector='toy', detector_sha256='b' * 64)
        evaluate.check_reference(other, toy, (3, 4, 4), 'r')


def test_kept_features_go_through_the_file(tmp_path):
    stats = reference_of(batch_of(9))
    save_statistics(stats, tmp_path / 'r.npz')
    again = load_statistics(tmp_path / 'r.npz')
    assert (again.features == stats.features).all() and again.features.dtype == np.float32 and again.shape == (3, 4, 4)
    assert load_statistics(tmp_path / 'r.npz', features=False).features is None
    np.savez(tmp_path / 'bad.npz', mu=np.zeros(4), sigma=np.eye(4), features=np.zeros((5, 3)))
    with pytest.raises(UserError, match=r'features \[5, 3\] and mu \[4\] do not fit'):
        load_statistics(tmp_path / 'bad.npz')


# Detectors


def made(spec, **context):
    """A detector as the command line names it."""
    return registry.build(spec, detectors.DETECTORS, '--detector', **context)(device='cpu')


def test_pixels_are_in_network_units():
    features, logits = detectors.pixel_detector('cpu')(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    assert features.tolist() == [[-1.0, 1.0]] and logits is None


@pytest.mark.parametrize('options', ['channels_last=true', 'precision=bf16', 'precision=bf16,channels_last=true'])
def test_named_variants_of_inception(weights, options):
    """Other orders of the same sums stay within rounding; half precision does not, and has a name of its own."""
    images = torch.from_numpy(batch_of(2, (3, 24, 24)))
    plain, variant = made(f'inception:weights={weights}'), made(f'inception:weights={weights},{options}')
    a, b = plain(images), variant(images)
    assert b[0].dtype == b[1].dtype == torch.float32
    error = float((a[0] - b[0]).abs().max() / a[0].abs().max())
    if 'bf16' in options:
        assert 1e-5 < error < 0.05 and variant.name == 'inception:precision=bf16' and variant.sha256 == plain.sha256
        with pytest.raises(UserError, match='pass --detector=inception:precision=bf16'):
            evaluate.check_reference(Statistics(np.zeros(2048), np.eye(2048), detector=variant.name), plain, (3, 24, 24), 'r')
    else:
        assert error < 1e-4 and variant.name == 'inception'


class Doubler(torch.nn.Module):
    """A detector of the user's: the mean of each channel, times a weight."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(3))

    def forward(self, images, return_features: bool = False):
        assert images.dtype == torch.uint8
        pooled = images.float().mean(dim=(2, 3)) * self.factor
        return pooled + 1 if return_features else pooled


class WithLogits(Doubler):
    def forward(self, images):
        return images.float().mean(dim=(2, 3)), images.float().sum(dim=(2, 3))


class Crooked(Doubler):
    def forward(self, images):
        return images.float()


class Failing(Doubler):
    def forward(self, images):
        raise RuntimeError('a trace\nwrong size')


def test_torchscript_detector(tmp_path):
    torch.jit.script(Doubler()).save(str(tmp_path / 'd.pt'))
    images = torch.from_numpy(batch_of(3))
    detector = made(f'torchscript:path={tmp_path / "d.pt"}')
    torch.testing.assert_close(detector(images)[0], images.float().mean(dim=(2, 3)))
    assert detector.dim((3, 4, 4)) == 3 and len(detector.sha256) == 64 and detector.name == 'torchscript'
    torch.testing.assert_close(detector(images[:, :1])[0], images[:, :1].float().mean(dim=(2, 3)).expand(-1, 3))  # grey as RGB
    flagged = made(f'torchscript:path={tmp_path / "d.pt"},return_features=true')
    torch.testing.assert_close(flagged(images)[0], images.float().mean(dim=(2, 3)) + 1)


def test_detector_on_the_python_path(tmp_path):
    """Its class is named, its weights come from a safetensors file; it may return logits."""
    safetensors.torch.save_file({'factor': torch.tensor([1., 2, 3])}, tmp_path / 'w.safetensors')
    images = torch.from_numpy(batch_of(3))
    detector = made(f'module:name={__name__}.Doubler,weights={tmp_path / "w.safetensors"}')
    torch.testing.assert_close(detector(images)[0], images.float().mean(dim=(2, 3)) * torch.tensor([1., 2, 3]))
    assert detector.name == f'module:{__name__}.Doubler' and len(detector.sha256) == 64
    features, logits = made(f'module:name={__name__}.WithLogits')(images)
    assert logits.shape == (3, 3)
    found = evaluate.evaluate_batches([images], made(f'module:name={__name__}.WithLogits'), None, ('is',), evaluate.Settings(splits=1))
    assert 1 <= found['inception_score'] <= 3


@pytest.mark.parametrize('spec, message', [
    ('torchscript', 'name the archive'), ('torchscript:path=nowhere.pt', 'nowhere.pt: no such file'),
    ('torchscript:path={here}', 'not a TorchScript archive'), ('module', 'package.module.Class'),
    ('module:name=no.such.Thing', 'No module named.*PYTHONPATH'), ('module:name=json.Nothing', 'Nothing.*PYTHONPATH'),
    (f'module:name={__name__}.Doubler,weights=nowhere', 'nowhere: no such file'),
    (f'module:name={__name__}.Doubler,weights={{here}}', 'weights=.*header'),
    (f'module:name={__name__}.Crooked', r'returned \[1, 3, 4, 4\] for 1 images, expected features'),
    (f'module:name={__name__}.Failing', r'called with uint8 \[1, 3, 4, 4\]: wrong size'),
    ('inception:precision=fp8', 'choose from fp32, bf16, fp16'), ('inception:speed=9', 'has no key "speed"'),
    ('pixel', 'choose from inception, pixels, dinov2, clip, vgg16, torchscript, module')])
def test_detectors_that_are_none(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        made(spec.format(here=__file__)).dim((3, 4, 4))
    assert '\n' not in caught.value.message and '--detector' in caught.value.message


def test_detectors_refuse_images_they_cannot_take(weights):
    with pytest.raises(UserError, match='12288.*4096.*--detector=inception'):
        detectors.pixel_detector('cpu').dim((3, 64, 64))
    with pytest.raises(UserError, match='got 5'):
        detectors.inception_detector('cpu', weights).dim((5, 8, 8))


def test_dinov2_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)  # which makes its import fail
    with pytest.raises(UserError, match='pip install transformers'):
        made('dinov2')


def test_dinov2(tmp_path):
    """A tiny network of its kind, from a folder: the class token of images that were resized and normalised."""
    transformers = pytest.importorskip('transformers')
    config = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14)
    net = transformers.Dinov2Model(config).eval()
    net.save_pretrained(tmp_path / 'm')
    detector = made(f'dinov2:model={tmp_path / "m"}')
    images = torch.full((2, 1, 16, 16), 100, dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    flat = ((100 / 255 - mean) / std).reshape(1, 3, 1, 1).expand(2, -1, 224, 224)
    expected = net(pixel_values=flat).last_hidden_state[:, 0]
    torch.testing.assert_close(detector(images)[0], expected, rtol=1e-3, atol=1e-4)
    assert detector.dim((1, 16, 16)) == 8 and len(detector.sha256) == 64
    (tmp_path / 'm' / 'model.safetensors').unlink()
    with pytest.raises(UserError, match='no model.safetensors'):
        made(f'dinov2:model={tmp_path / "m"}')


def test_a_detector_that_the_hub_does_not_give(monkeypatch):
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda *args, **kwargs: (_ for _ in ()).throw(OSError('offline\nand more')))
    with pytest.raises(UserError, match=r'--detector=dinov2:model=owner/name: .* says: offline.* download .* --detector=dinov2:model=DIR$'):
        detectors._model_file('owner/name')


# Ranks


RANK_SCRIPT = '''
import json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from dnnlib import UserError
from metrics import evaluate, image_files
from tests.metrics.test_evaluate import ANYWHERE, SETTINGS, Toy, batch_of, reference_of
from torch_utils import distributed
distributed.init()
rank, size = distributed.rank(), distributed.size()
shares = lambda images: [images[rank::size][i:i + 2] for i in range(0, len(images[rank::size]), 2)]
results, reference = [], evaluate.collect(shares(batch_of(31, seed=1)), Toy(), keep_features=True).statistics
for count, metrics in ((1, ('fid',)), (23, ANYWHERE)):
    results.append(evaluate.evaluate_batches(shares(batch_of(23)[:count]), Toy(), reference, metrics, SETTINGS))
def bad():
    yield batch_of(2)
    raise image_files.BadImages('--gen-path=g', [(f'{rank}.png', 'is bad')], 5)
for batches in ([batch_of(2) if rank == 0 else batch_of(2).astype(float)], bad(), [batch_of(3 - 2 * rank)]):
    try:
        evaluate.collect(batches, Toy())
    except UserError as err:
        results.append(err.message)
assert len(distributed.all_values(results)) == 2 and all(each == results for each in distributed.all_values(results))
if rank == 0:
    json.dump(results, open(sys.argv[2], 'w'))
distributed.shutdown()
'''


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    """With 23 images (12 and 11 a rank) and with 1 (a rank has none); an error of rank 1 reaches rank 0, bad files of both are told."""
    (tmp_path / 'ranks.py').write_text(RANK_SCRIPT)
    done = launch.run(tmp_path / 'ranks.py', [ROOT, tmp_path / 'out.json'], ranks=2)
    assert done.returncode == 0, done.stderr
    one, all_of_them, *errors = json.loads((tmp_path / 'out.json').read_text())
    reference = reference_of(batch_of(31, seed=1))
    assert one == pytest.approx(evaluate.evaluate_batches([batch_of(23)[:1]], Toy(), reference, ('fid',)), rel=1e-10)
    alone = evaluate.evaluate_batches([batch_of(23)], Toy(), reference, ANYWHERE, SETTINGS)
    assert all_of_them == pytest.approx(alone, rel=1e-10)
    assert 'must be uint8' in errors[0]
    assert errors[1] == '--gen-path=g: 2 of 10 images cannot be used: 0.png is bad; 1.png is bad'
    assert '4 images are unevenly shared among 2 ranks' in errors[2]


def test_features_are_gathered_in_the_order_of_the_images(monkeypatch):
    """Three ranks, played one after the other: the exchange in parts of 4 rows puts each row where its image belongs."""
    whole, parts = torch.arange(22.).reshape(11, 2), []
    for rank in (2, 1, 0):
        sums = iter([sum(column) for column in zip(*parts)]) if rank == 0 else None
        monkeypatch.setattr(evaluate, 'GATHER_ROWS', 4)
        monkeypatch.setattr(evaluate.distributed, 'size', lambda: 3)
        monkeypatch.setattr(evaluate.distributed, 'rank', lambda rank=rank: rank)
        seen = []
        monkeypatch.setattr(evaluate.distributed, 'all_sum',
                            lambda x, sums=sums, seen=seen: (seen.append(x), x if sums is None else x + next(sums))[1])
        run = evaluate._Run(Toy(), SETTINGS, False, True)
        run.features = [whole[rank::3]]
        run.moments = type('Moments', (), {'count': 11, 'mean': torch.zeros(2)})
        found = run._all_features(range(rank, 11, 3))
        parts.append(seen)
    assert (found == whole.numpy()).all()


def test_bad_images_module_is_the_one_raised():
    """One rank alone: the error keeps its files."""
    def batches():
        yield batch_of(1)
        raise image_files.BadImages('--gen-path=g', [('a.png', 'is bad')], 2)
    with pytest.raises(image_files.BadImages, match='1 of 2 images cannot be used: a.png is bad'):
        evaluate.collect(batches(), Toy())


def test_the_documentation_names_every_metric_and_detector():
    text = (ROOT / 'docs' / 'evaluation.md').read_text()
    assert all(f'| `{name}' in text for name in (*evaluate.METRICS, *detectors.DETECTORS))
    keys = [key for piece in detectors.DETECTORS.values() for key in registry.parameters(piece)]
    assert all(f'{key}=' in text for key in keys if key != 'weights')
