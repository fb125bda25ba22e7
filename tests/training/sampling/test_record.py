# SPDX-License-Identifier: Apache-2.0
"""The record beside generated images: what it tells, what it refuses, how kills, merges and other options leave it."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch

from dnnlib import EasyDict, UserError
from tests.support import tiny as tiny_run
from tests.support.tiny import make_zip
from tests.support.unets import ROOT, contents, refused, run, tiny
from torch_utils import misc
from torch_utils.command_line import ranges
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.sampling import folder, generation, guidance, labels, record, steppers
from training.sampling import pieces as sampling
from training.sampling.generate import ConditionedDenoiser, guided, noise_levels


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Snapshot folders of networks, by kind."""
    root = tmp_path_factory.mktemp('networks')
    networks = {'a': tiny(), 'b': tiny(key='b'), 'labels': tiny(label_dim=3, label_dropout=0.1), 'slow': tiny(3, size=32, key='slow')}
    for name, net in networks.items():
        save_network(net, root / name)
    return root


def generated(network, outdir, *options):
    result = run(network, outdir, *options)
    assert result.exit_code == 0, result.output
    return read(outdir)


def read(outdir):
    return json.loads((outdir.parent / f'{outdir.name}.json').read_text())


# --- what it tells

def test_guided_channels_belong_to_the_images(tmp_path):
    save_network(tiny(3, label_dim=3, label_dropout=0.1), tmp_path / 'net')
    options = [tmp_path / 'net', tmp_path / 'out', '--seeds=0', '--guidance=2']
    assert generated(*options, '--guidance-channels=2')['guidance_channels'] == 2
    result = run(*options, '--skip-existing')
    assert result.exit_code != 0 and '--guidance-channels: 2, now none' in result.output
    for name, others in (('every', ['--guidance=2', '--guidance-channels=3']), ('unguided', [])):  # 3 are all that there are
        assert 'guidance_channels' not in generated(tmp_path / 'net', tmp_path / name, '--seeds=0', *others)


def test_the_record_of_a_folder(folders, tmp_path):
    found = generated(folders / 'a', tmp_path / 'out', '--seeds=0-2,5', '--sampler=heun:S_churn=0')
    assert {key: found[key] for key in found.keys() - {'made_by', 'sigmas'}} == {
        'kind': 'generated images', 'network': str(folders / 'a'), 'sha256': misc.state_digest(load_network(folders / 'a')),
        'weights': 'ema', 'sampler': 'heun', 'levels': 'edm', 'steps': 2, 'evaluations': 3, 'guidance': 1, 'precision': 'fp32',
        'compile': False, 'image_shape': [1, 8, 8], 'format': 'png', 'subdirs': False, 'seeds': '0-2,5', 'num_images': 4, 'complete': True}
    assert found['sigmas'] == pytest.approx([80, 0.002, 0]) and not list(tmp_path.glob('out/.*'))
    (machine,) = found['made_by']
    assert machine == {'device': 'cpu', 'threads': torch.get_num_threads(), 'ranks': 1, 'versions': misc.versions()}


def test_only_what_applies_is_told(folders, tmp_path):
    found = generated(folders / 'labels', tmp_path / 'out', '--seeds=0', '--steps=4', '--guidance=1.5', '--guidance-interval=0.1,20',
                      '--sampler=euler', '--S-churn=3', '--rho=5', '--class=2', '--stop-sigma=0.01')
    assert (found['sampler'], found['levels'], found['stop_sigma']) == ('euler:S_churn=3', 'edm:rho=5', 0.01)
    assert (found['guidance'], found['guidance_interval'], found['labels']) == (1.5, [0.1, 20], {'source': 'class', 'class': 2})
    inside = sum(0.1 < sigma <= 20 for sigma in found['sigmas'])
    assert 0 < inside < 4 and found['guide_evaluations'] == inside
    assert found['evaluations'] == sum(sigma >= 0.01 for sigma in found['sigmas']) + inside
    other = generated(folders / 'labels', tmp_path / 'other', '--seeds=0', '--guidance=2', f'--gnet={folders / "labels"}')
    assert 'guidance_interval' not in other and other['labels'] == {'source': 'uniform'}
    assert other['gnet_sha256'] == other['sha256'] and other['guide_evaluations'] == 3 and other['evaluations'] == 6


@pytest.mark.parametrize('sampler', sorted(steppers.STEPPERS))
@pytest.mark.parametrize('weight, limits', [(1.0, (0.0, np.inf)), (2.0, (0.0, np.inf)), (2.0, (0.5, 10.0))])
def test_evaluations_are_those_of_the_network(folders, sampler, weight, limits):
    """The count without a network against the calls that sampling makes of one."""
    net = load_network(folders / 'labels')
    pieces = sampling.sampler_pieces(net, steps=5, sampler=sampler)
    sigmas = noise_levels(net, pieces['schedule'], 5)
    denoise = guided(net, torch.tensor([1]), guidance.Guidance(weight, limits))
    pieces['stepper'](denoise, torch.ones(1, 1, 8, 8).double() * sigmas[0], sigmas, torch.ones_like)
    calls = (denoise.calls, 0) if isinstance(denoise, ConditionedDenoiser) else (denoise.denoise.calls, denoise.guide.calls)
    found = record.count_evaluations(net, pieces['stepper'], sigmas, guidance.Guidance(weight, limits))
    assert found == (sum(calls), calls[1])
    assert found[0] - found[1] == (9 if sampler == 'heun' else 5)


def test_equal_samplers_have_equal_names(folders):
    net = load_network(folders / 'a')
    def name(**given):
        return record.spec_of(given.get('sampler') or 'heun', sampling.sampler_pieces(net, 4, **given)['stepper'], steppers.STEPPERS)
    assert name() == name(S_churn=0.0) == name(sampler='heun:alpha=1,S_noise=1') == 'heun'
    assert name(S_churn=10.0) == name(sampler='heun:S_churn=10') == name(sampler='heun:S_churn=10.0') == 'heun:S_churn=10'
    assert name(sampler='ddim:clip=true') == 'ddim:clip=true' and name(sampler='ddim:clip=false') == 'ddim'
    assert name(schedule='vp', scaling='vp') == 'heun:schedule=vp,scaling=vp'


def test_labels_count_by_what_they_are(tmp_path):
    data = make_zip(tmp_path / 'data.zip')
    net = EasyDict(label_dim=3)
    (tmp_path / 'a.txt').write_text('0\n1\n2\n')
    (tmp_path / 'b.json').write_text('[0, 1, 2]')
    (tmp_path / 'c.txt').write_text('0\n1\n1\n')
    told = [record.describe_labels(EasyDict(class_idx=None, labels=spec), labels.pick(net, [0], spec))
            for spec in (str(tmp_path / 'a.txt'), str(tmp_path / 'b.json'), str(tmp_path / 'c.txt'), f'dataset:{data}')]
    assert [each['source'] for each in told] == ['file', 'file', 'file', 'dataset'] and told[3]['path'] == str(data)
    differ = [bool(record.differences({'labels': told[0]}, {'labels': other})) for other in told]
    assert differ == [False, False, True, True]


# --- going on, and what is refused

@pytest.mark.parametrize('changed, words', [
    (['--network=b'], '--network: '), (['--steps=3'], '--steps: 2, now 3'), (['--sampler=euler'], '--sampler: heun, now euler'),
    (['--rho=5'], '--levels: edm from 80 to 0.002, now edm:rho=5'), (['--format=npy'], '--format: png, now npy'),
    (['--subdirs'], '--subdirs: False, now True'), (['--precision=bf16'], '--precision: fp32, now bf16'),
    (['--S-churn=4', '--steps=3'], '--sampler: heun, now heun:S_churn=4; --steps: 2, now 3')])
def test_going_on_with_other_options_is_refused_by_name(folders, tmp_path, changed, words):
    """Two networks, or step counts, passed as one set."""
    generated(folders / 'a', tmp_path / 'out', '--seeds=0-1')
    before = contents(tmp_path)
    network = folders / ('b' if changed == ['--network=b'] else 'a')
    levels = [] if changed != ['--rho=5'] else ['--steps=3']
    if levels:  # of two levels the exponent moves none
        generated(folders / 'a', tmp_path / 'out', '--seeds=0-1', *levels)
        before = contents(tmp_path)
    line = refused(run(network, tmp_path / 'out', '--seeds=0-3', '--skip-existing', *levels,
                       *(option for option in changed if not option.startswith('--network'))))
    assert line.startswith(f'Error: --skip-existing: {tmp_path / "out"} holds 2 images made with other options (') and words in line
    assert 'leave --skip-existing out' in line and contents(tmp_path) == before


def test_threads_batch_and_a_network_by_another_name_are_the_same_set(folders, tmp_path):
    generated(folders / 'a', tmp_path / 'out', '--seeds=0-1')
    os.symlink(folders / 'a', tmp_path / 'link')
    found = generated(tmp_path / 'link', tmp_path / 'out', '--seeds=0-3', '--skip-existing', '--batch=1', '--sampler=heun:S_churn=0')
    assert (found['seeds'], found['num_images'], found['complete']) == ('0-3', 4, True) and len(found['made_by']) == 1


def test_images_without_a_record_are_no_set_to_go_on_with(folders, tmp_path):
    generated(folders / 'a', tmp_path / 'out', '--seeds=0-1')
    (tmp_path / 'out.json').unlink()
    line = refused(run(folders / 'a', tmp_path / 'out', '--seeds=0-3', '--skip-existing'))
    assert f'holds 2 images without a record {tmp_path / "out.json"}; leave --skip-existing out' in line
    assert generated(folders / 'a', tmp_path / 'out', '--seeds=0-3')['num_images'] == 4


def test_images_that_the_record_does_not_tell_of_are_made(folders, tmp_path, monkeypatch):
    """An image that somebody put there is not taken for one of this set."""
    generated(folders / 'a', tmp_path / 'out', '--seeds=0-1')
    generated(folders / 'b', tmp_path / 'b', '--seeds=2')
    (tmp_path / 'out' / '000002.png').write_bytes((tmp_path / 'b' / '000002.png').read_bytes())
    def kill(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:  # before any image is made, but after the seed is recorded
        patch.setattr(generation, 'generate_images', kill)
        assert run(folders / 'a', tmp_path / 'out', '--seeds=0-2', '--skip-existing').exit_code
    assert read(tmp_path / 'out')['seeds'] == '0-2'
    result = run(folders / 'a', tmp_path / 'out', '--seeds=0-2', '--skip-existing')
    assert '1 written, 2 existed already' in result.output
    generated(folders / 'a', tmp_path / 'whole', '--seeds=0-2')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


def test_another_set_takes_the_place_of_the_whole_old_one_or_is_refused(folders, tmp_path):
    generated(folders / 'a', tmp_path / 'out', '--seeds=0-3', '--subdirs')
    before = contents(tmp_path / 'out')
    line = refused(run(folders / 'b', tmp_path / 'out', '--seeds=2-9'))
    assert 'holds 2 images, such as 000000/000000.png, made with other options (--network: ' in line
    assert 'choose another --outdir, or empty this one' in line and contents(tmp_path / 'out') == before
    found = generated(folders / 'b', tmp_path / 'out', '--seeds=0-4')
    assert found['seeds'] == '0-4' and not found['subdirs'] and sorted(contents(tmp_path / 'out')) == [f'00000{i}.png' for i in range(5)]
    for path in (tmp_path / 'out').glob('*.png'):  # emptied, as told
        path.unlink()
    assert generated(folders / 'a', tmp_path / 'out', '--seeds=9')['seeds'] == '9'


def test_a_kill_while_the_old_set_gives_way_leaves_no_mixture(folders, tmp_path, monkeypatch):
    generated(folders / 'a', tmp_path / 'out', '--seeds=0-3')
    class Killed(BaseException):
        pass
    def kill(*args):
        raise Killed
    monkeypatch.setattr(folder.Files, 'remove_leftovers', kill)
    with pytest.raises(Killed):
        run(folders / 'b', tmp_path / 'out', '--seeds=0-3')
    monkeypatch.undo()
    found = read(tmp_path / 'out')
    assert not contents(tmp_path / 'out') and not found['complete'] and found['unfinished'] == '0-3' and found['num_images'] == 0
    assert found['sha256'] == misc.state_digest(load_network(folders / 'a'))


def test_other_seeds_of_the_same_options_join(folders, tmp_path):
    generated(folders / 'a', tmp_path / 'out', '--seeds=0-1')
    found = generated(folders / 'a', tmp_path / 'out', '--seeds=7,1')
    assert (found['seeds'], found['num_images'], found['complete']) == ('0-1,7', 3, True)


def test_jobs_at_once_into_one_folder_join(folders, tmp_path):
    """Two processes, each with seeds of its own."""
    out, jobs = tmp_path / 'out', []
    for i in range(2):
        args = [f'--network={folders / "a"}', f'--outdir={out}', f'--seeds={i * 3}-{i * 3 + 2}', '--steps=2', '--threads=1', '--device=cpu',
                '--skip-existing']
        jobs.append(tiny_run.start(args, tmp_path / f'log{i}.txt', script=ROOT / 'generate.py'))
    assert [job.wait() for job in jobs] == [0] * 2
    found = read(out)
    assert (found['seeds'], found['num_images'], found['complete']) == ('0-5', 6, True) and len(found['made_by']) == 1
    assert sorted(contents(out)) == [f'{seed:06d}.png' for seed in range(6)]


def test_a_job_whose_record_was_replaced_says_so(folders, tmp_path, monkeypatch):
    close = folder.RecordedFolder.close
    def late(self, seeds):
        (tmp_path / 'out.json').write_text(json.dumps({**read(tmp_path / 'out'), 'steps': 7}))
        return close(self, seeds)
    monkeypatch.setattr(folder.RecordedFolder, 'close', late)
    line = refused(run(folders / 'a', tmp_path / 'out', '--seeds=0'))
    assert 'was replaced by a run with other options' in line


def test_a_killed_run_leaves_a_record_that_says_so(folders, tmp_path):
    out = tmp_path / 'out'
    args = [f'--network={folders / "slow"}', f'--outdir={out}', '--seeds=0-199', '--steps=9', '--batch=2', '--threads=1', '--device=cpu']
    process = tiny_run.start(args, tmp_path / 'log.txt', script=ROOT / 'generate.py')
    while process.poll() is None and not list(out.glob('[0-9]*.png')):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = read(out)
    assert not found['complete'] and found['unfinished'] == found['seeds'] == '0-199' and found['num_images'] == 0
    names = [path.name for path in out.glob('[0-9]*.png')]
    assert 0 < len(names) < 200
    assert 'images that it lists are missing' in folder.record_of(out, names, (3, 32, 32))[1]


@pytest.mark.parametrize('text, words', [
    ('[]', 'expected a JSON object'), ('{"a": 1}', 'is not a record of generated images, which has to go there'),
    ('{"kind": "generated images", "format": "png", "subdirs": false, "seeds": "1-"}', '"seeds" must be ranges'),
    ('{"kind": "generated images", "format": "png", "subdirs": false, "seeds": "0-999999999999"}', 'names more than'),
    ('{"kind": "generated images", "format": "png", "subdirs": false}', '"seeds" must be ranges')])
def test_what_is_no_record_is_refused_and_kept(folders, tmp_path, text, words):
    (tmp_path / 'out.json').write_text(text)
    line = refused(run(folders / 'a', tmp_path / 'out', '--seeds=0'))
    assert str(tmp_path / 'out.json') in line and words in line and (tmp_path / 'out.json').read_text() == text


@pytest.mark.parametrize('seeds', [[], [0], [5, 6, 7], [0, 2, 3, 10 ** 12]])
def test_numbers_undo_ranges(seeds):
    assert folder.numbers(ranges(seeds), 'x') == set(seeds)
    for bad in ('1,', ',1', '1-2-3', 'a', '1 2', None, 5, '-1'):
        with pytest.raises(UserError, match='x must be ranges'):
            folder.numbers(bad, 'x')
