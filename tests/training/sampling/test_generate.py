# SPDX-License-Identifier: Apache-2.0
"""Seeds to images: published draws and pictures; pixels that depend on the seed alone; files, grids and what is refused."""

import functools
import re

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from tests.support import GOLDEN
from tests.support.unets import all_images, contents, golden_network, launched, run, tiny
from torch_utils import misc
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.diffusion import schedules
from training.sampling import labels, steppers
from training.sampling.generate import ConditionedDenoiser, SeededDraws, generate_images, noise_levels, sample_grid
from training.sampling.pixels import GRID_CELL, GRID_GAP, to_uint8
from training.sampling.writers import Writers, write_npy, write_png

DATA = GOLDEN
CHURN = functools.partial(steppers.heun, S_churn=10)


@pytest.fixture(scope='module')
def golden():
    return load_file(DATA / 'samplers' / 'samplers.safetensors')


# --- published draws and pictures

@pytest.mark.parametrize('name, shape, classes', [('32x32', [3, 32, 32], 10), ('8x8', [3, 8, 8], 1000),
                                                  ('tiny2x2', [1, 2, 2], 10)])
def test_draws_are_the_published_ones(name, shape, classes):
    expected = load_file(DATA / 'samplers' / 'stacked_rng.safetensors')
    draws = SeededDraws([0, 1, 2, 3])
    latents = draws.randn(shape)
    # PyTorch has other approximations of log, sin and cos for float32 normals on CPUs with AVX2, where the published ones were drawn.
    exact = shape == [1, 2, 2] or torch.backends.cpu.get_cpu_capability() != 'DEFAULT'
    torch.testing.assert_close(latents, expected[f'{name}.latents'], rtol=0, atol=0 if exact else 4e-6)
    assert torch.equal(draws.randint(classes), expected[f'{name}.labels'])
    assert torch.equal(draws.randn_like(latents.double()), expected[f'{name}.randn_like_f64_after'])
    assert torch.equal(draws.randn_like(latents.double()), expected[f'{name}.randn_like_f64_second'])


def test_seeds_count_modulo_2_to_the_32():
    same, other = (SeededDraws([seed]).randn([1, 4, 4]) for seed in (2 ** 32 + 7, 8))
    assert torch.equal(same, SeededDraws([7]).randn([1, 4, 4])) and not torch.equal(same, other)


@pytest.mark.parametrize('case, stepper', [('net.edm_6', steppers.heun), ('net.edm_6_churn10', CHURN)])
def test_published_images_of_a_conditional_network(golden, case, stepper):
    parts = list(generate_images(golden_network('edm_ddpmpp_cond_aug'), [0, 1, 2], num_steps=6, stepper=stepper))
    assert torch.equal(parts[0].labels, golden['net.class_idx'])
    torch.testing.assert_close(parts[0].images, golden[case], rtol=0, atol=1e-4)
    if case == 'net.edm_6':
        pixels = to_uint8(parts[0].images).permute(0, 2, 3, 1)
        # An error of 1e-4 moves a value over a grey level's edge in about one of 80 pixels at the very most.
        assert ((pixels.int() - golden['net.png_uint8'].int()).abs() <= 1).all()
        assert (pixels == golden['net.png_uint8']).float().mean() > 0.98


def test_published_images_of_a_network_with_discrete_levels(golden):
    net = golden_network('iddpm_song', 'iddpm')
    levels = noise_levels(net, schedules.edm, 5)
    found = steppers.heun(ConditionedDenoiser(net), golden['net_iddpm.latents'].double() * levels[0], levels, None)
    expected = golden['net_iddpm.edm_5']
    # This network's random weights make images of size 350, so that float32's rounding is larger than for others, too.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_grey_levels_are_the_published_ones():
    values = torch.tensor([-2, -1, 0, 0.001, 1, 2], dtype=torch.float64)
    assert to_uint8(values).tolist() == [0, 0, 128, 128, 255, 255]


# --- an image is a function of its seed alone

@pytest.mark.parametrize('label_dim', [0, 3])
def test_pixels_do_not_depend_on_the_batch(label_dim, monkeypatch):
    monkeypatch.setattr(misc, 'CPU_ROWS', (4, 4))  # so that the images need several calls
    net = tiny(3, label_dim, size=16)
    expected = all_images(net, range(11), batch=1, stepper=CHURN)
    for batch in (5, 8, 64):
        assert torch.equal(all_images(net, range(11), batch=batch, stepper=CHURN), expected), batch
    assert torch.equal(all_images(net, [9, 4], stepper=CHURN), expected[[9, 4]])
    assert expected.flatten(1).unique(dim=0).shape[0] == 11


def test_a_batch_is_a_multiple_of_the_rows_of_a_call():
    sizes = lambda batch: [len(part.seeds) for part in generate_images(tiny(), range(140), batch=batch, num_steps=1)]
    assert sizes(1) == sizes(64) == [64, 64, 12] and sizes(65) == [128, 12]


@pytest.mark.parametrize('case, precond', [('edm_adm_cond', 'edm'), ('edm_ddpmpp_cond_aug', 'edm'), ('edm_ncsnpp_cond_aug', 'edm'),
                                           ('iddpm_song', 'iddpm')])
def test_pixels_of_the_published_architectures_do_not_depend_on_the_batch(case, precond):
    net = golden_network(case, precond)
    images = {batch: all_images(net, range(7), batch=batch, stepper=CHURN, num_steps=2) for batch in (1, 3, 64)}
    assert torch.equal(images[1], images[3]) and torch.equal(images[1], images[64])


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_row_keeps_its_bits_in_any_place_though_threads_share_it(three_threads):
    """Three threads cut eight rows of 28x28 pixels in the middle, where PyTorch's SiLU leaves its whole vectors."""
    denoise, x = ConditionedDenoiser(tiny(size=28), rows=8), SeededDraws(range(8)).randn([1, 28, 28])
    with torch.no_grad():
        expected = denoise(x, torch.tensor(1.0))
        for shift in range(1, 8):
            assert torch.equal(denoise(x.roll(shift, 0), torch.tensor(1.0)), expected.roll(shift, 0)), shift


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_pixels_on_a_gpu_are_at_most_a_grey_level_apart():
    net = golden_network('edm_ddpmpp_cond_aug').cuda()
    pixels = {batch: to_uint8(all_images(net, range(11), batch=batch, stepper=CHURN)).int() for batch in (1, 3, 64)}
    assert max((pixels[1] - pixels[batch]).abs().max() for batch in (3, 64)) <= 1


def test_ranks_share_the_seeds_and_change_nothing():
    net = tiny(label_dim=3)
    alone = {seed: (image, label) for part in generate_images(net, range(7), num_steps=2)
             for seed, image, label in zip(*part)}
    shared = [list(generate_images(net, range(7), num_steps=2, batch=2, rank=rank, world=3)) for rank in range(3)]
    seeds = [seed for parts in shared for part in parts for seed in part.seeds]
    assert sorted(seeds) == list(range(7))
    for part in (part for parts in shared for part in parts):
        for seed, image, label in zip(*part):
            assert torch.equal(image, alone[seed][0]) and label == alone[seed][1]


def test_more_ranks_than_seeds():
    assert list(generate_images(tiny(), [5], num_steps=1, rank=1, world=2)) == []


def test_the_global_random_state_is_left_alone():
    net = tiny(label_dim=2)
    before = torch.random.get_rng_state()
    all_images(net, [1, 2], stepper=CHURN)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_classes():
    net = tiny(label_dim=4)
    drawn = next(generate_images(net, range(64), num_steps=1)).labels
    assert set(drawn.tolist()) == {0, 1, 2, 3}
    part = next(generate_images(net, range(3), num_steps=2, labels=labels.one_class(2)))
    assert part.labels.tolist() == [2, 2, 2]
    # The class is drawn even where it is given, so that seed i has the same latents and churn for every class.
    natural = next(seed for seed in range(64) if drawn[seed] == 2)
    assert torch.equal(all_images(net, [natural], stepper=CHURN), all_images(net, [natural], stepper=CHURN, labels=labels.one_class(2)))


def test_no_autograd_graph_is_kept():
    """Published: weights that require grad, and no no_grad anywhere, so that the graph of all evaluations was kept."""
    net = tiny()
    assert all(p.requires_grad for p in net.parameters())
    part = next(generate_images(net, [0], num_steps=2))
    assert part.images.grad_fn is None and not part.images.requires_grad
    assert torch.is_grad_enabled()  # between the batches of a generator, too


def test_levels_stay_within_the_networks_range():
    net = golden_network('iddpm_song', 'iddpm')
    levels = noise_levels(net, schedules.edm, 5)
    assert levels[-2] == net.u[-2] and levels[-1] == 0  # 0.002 is under the network's lowest level
    assert torch.equal(levels[:-1], net.round_sigma(levels[:-1]))
    assert levels[0].item() == pytest.approx(80, rel=0.02)
    assert noise_levels(tiny(precond='ve'), schedules.edm, 5)[-2].item() == pytest.approx(0.02)


# --- files

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Snapshot folders of tiny networks, by kind."""
    root = tmp_path_factory.mktemp('networks')
    units = {'offset': [1, 2, 3, 4, 5], 'scale': 10}
    networks = {'grey': tiny(), 'rgb': tiny(3, label_dim=3), 'five': tiny(5, size=[8, 16], units=units)}
    for name, net in networks.items():
        save_network(net, root / name)
    return root


def test_greyscale_images_are_saved(folders, tmp_path):
    """Published: fromarray of [H,W,1] raises TypeError."""
    result = run(folders / 'grey', tmp_path / 'out', '--seeds=0-2')
    assert result.exit_code == 0, result.output
    assert '3 images (png)' in result.output
    assert sorted(contents(tmp_path / 'out')) == ['000000.png', '000001.png', '000002.png']
    picture = PIL.Image.open(tmp_path / 'out' / '000001.png')
    assert picture.mode == 'L'
    expected = to_uint8(all_images(load_network(folders / 'grey'), [1], num_steps=2))[0, 0]
    assert np.array_equal(np.asarray(picture), expected.numpy())


def test_subfolders_and_rgb(folders, tmp_path):
    result = run(folders / 'rgb', tmp_path, '--seeds=999,1000,1234567', '--subdirs')
    assert result.exit_code == 0, result.output
    assert sorted(contents(tmp_path)) == ['000000/000999.png', '001000/001000.png', '1234000/1234567.png']
    assert PIL.Image.open(tmp_path / '001000' / '001000.png').mode == 'RGB'


def test_float_data_comes_out_in_physical_units(folders, tmp_path):
    result = run(folders / 'five', tmp_path / 'out', '--seeds=3', '--grid')
    assert result.exit_code == 0, result.output
    found = np.load(tmp_path / 'out' / '000003.npy')
    expected = all_images(load_network(folders / 'five'), [3], num_steps=2)[0]
    assert found.dtype == np.float32 and found.shape == (5, 8, 16)
    np.testing.assert_allclose(found, expected.numpy() * 10 + np.arange(1, 6)[:, None, None], rtol=1e-6)
    assert PIL.Image.open(tmp_path / 'out-grid.png').mode == 'L'


def test_npz_holds_image_seed_and_label(folders, tmp_path):
    result = run(folders / 'rgb', tmp_path, '--seeds=4', '--format=npz', '--class=1')
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / '000004.npz') as found:
        assert (found['seed'], found['label']) == (4, 1)
        expected = all_images(load_network(folders / 'rgb'), [4], num_steps=2, labels=labels.one_class(1))[0]
        np.testing.assert_array_equal(found['image'], expected.float().numpy())


def test_published_option_names(folders, tmp_path):
    options = ['--seeds=0-3', '--S_churn=8', '--S_min=0.05', '--S_max=50', '--S_noise=1.003', '--sigma_min=0.01',
               '--sigma_max=20', '--rho=5']
    first = run(folders / 'rgb', tmp_path / 'a', *options, '--max_batch_size=3')
    second = run(folders / 'rgb', tmp_path / 'b', *options, '--batch=1')
    plain = run(folders / 'rgb', tmp_path / 'c', '--seeds=0-3', '--batch_size=64')
    assert first.exit_code == second.exit_code == plain.exit_code == 0, first.output + second.output + plain.output
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b') != contents(tmp_path / 'c')


def test_bfloat16_inside_the_network_is_close_and_not_equal(folders, tmp_path):
    for precision in ('fp32', 'bf16'):
        assert run(folders / 'rgb', tmp_path / precision, '--seeds=0', '--format=npy', f'--precision={precision}').exit_code == 0
    full, half = (np.load(tmp_path / precision / '000000.npy') for precision in ('fp32', 'bf16'))
    assert 0 < np.abs(full - half).max() < 0.05 * np.abs(full).max()


def test_raw_and_averaged_weights_of_a_training_state(tmp_path):
    net, average = tiny(), tiny()
    average.requires_grad_(False)
    for p in average.parameters():
        p.mul_(1.1)
    state = {'options': {'network': net.config}, 'progress': {}, 'net': net.state_dict(),
             'ema': {'halflife': average.state_dict()}, 'optimizer': {}, 'objective': {}}
    path = tmp_path / 'training-state-000001.pt'
    torch.save(state, path)
    for weights, source in (('ema', average), ('raw', net)):
        result = run(path, tmp_path / weights, '--seeds=0', f'--weights={weights}', '--format=npy')
        assert result.exit_code == 0, result.output
        np.testing.assert_array_equal(np.load(tmp_path / weights / '000000.npy'), all_images(source, [0], num_steps=2)[0].float())


def test_grid_shows_the_first_images_in_order(folders, tmp_path):
    result = run(folders / 'grey', tmp_path / 'out', '--seeds=0-4', f'--grid={tmp_path / "grid.png"}', '--batch=2')
    assert result.exit_code == 0, result.output
    pixels = np.asarray(PIL.Image.open(tmp_path / 'grid.png'))
    zoom = GRID_CELL // 8
    cell = 8 * zoom + GRID_GAP
    assert pixels.shape == (2 * cell + GRID_GAP, 3 * cell + GRID_GAP)
    for i in range(5):
        top, left = GRID_GAP + i // 3 * cell, GRID_GAP + i % 3 * cell
        shown = pixels[top:top + 8 * zoom:zoom, left:left + 8 * zoom:zoom]
        assert np.array_equal(shown, np.asarray(PIL.Image.open(tmp_path / 'out' / f'00000{i}.png')))


def test_sample_grid_for_the_training_loop(tmp_path):
    sample_grid(tiny(3), 4, tmp_path / 'samples.png', num_steps=2)
    pixels = np.asarray(PIL.Image.open(tmp_path / 'samples.png'))
    assert pixels.shape == (134, 134, 3)
    expected = to_uint8(all_images(tiny(3), range(4), num_steps=2))
    assert np.array_equal(pixels[68:132:8, 2:66:8].transpose(2, 0, 1), expected[2])


def test_two_ranks_write_the_images_of_one(folders, tmp_path):
    """Equal files and grid for 1 rank at batch 64 and 2 ranks at batches 1 and 3; equal threads, classes drawn at random."""
    common = [f'--network={folders / "rgb"}', '--seeds=0-8', '--steps=3', '--S_churn=5', '--threads=1', '--grid', '--device=cpu']
    alone = launched(1, *common, f'--outdir={tmp_path / "alone"}')
    assert alone.returncode == 0, alone.stderr
    for batch in (1, 3):
        result = launched(2, *common, f'--outdir={tmp_path / str(batch)}', f'--batch={batch}')
        assert result.returncode == 0, result.stderr
        assert result.stdout.count('9 images (png)') == 1
        assert contents(tmp_path / str(batch)) == contents(tmp_path / 'alone')
        assert (tmp_path / f'{batch}-grid.png').read_bytes() == (tmp_path / 'alone-grid.png').read_bytes()


def test_a_failing_rank_fails_the_command(folders, tmp_path):
    """Seed 1000 falls to rank 1, where its folder cannot be made."""
    (tmp_path / '001000').write_text('in the way')
    options = [f'--network={folders / "grey"}', f'--outdir={tmp_path}', '--seeds=0,1000', '--subdirs', '--steps=1', '--threads=1']
    result = launched(2, *options)
    assert result.returncode != 0 and '001000' in result.stderr and 'images (png)' not in result.stdout


# --- what is refused, in one line

@pytest.mark.parametrize('kind, options, words', [
    ('grey', ['--seeds=3-0'], 'runs backwards'),
    ('grey', ['--seeds=a-b'], 'not a list of whole numbers'),
    ('rgb', ['--class=3'], 'classes 0 to 2'),
    ('rgb', ['--class=-1'], '-1'),
    ('grey', ['--class=0'], 'unconditional'),  # published: None[:, :] = 0 is a TypeError
    ('grey', ['--batch=0'], '--batch'),
    ('grey', ['--steps=0'], '--steps'),
    ('grey', ['--sigma_min=90'], 'sigma_min < sigma_max'),
    ('grey', ['--sigma_max=nan'], 'sigma_max'),
    ('grey', ['--rho=0'], 'rho'),
    ('grey', ['--S_churn=-1'], 'S-churn'),
    ('grey', ['--S_noise=nan'], 'S_noise'),
    ('five', ['--format=png'], 'data that is not 8-bit'),
    ('grey', ['--grid=picture.jpg'], '.png'),
    ('grey', ['--device=abacus'], '--device=abacus'),
    ('grey', ['--weights=raw'], 'training-state'),
    ('missing', [], 'no such'),
])
def test_mistakes_are_refused_in_one_line(folders, tmp_path, kind, options, words):
    result = run(folders / kind, tmp_path / 'out', *options)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit)
    error = [line for line in result.output.splitlines() if line.startswith('Error:')]
    assert len(error) == 1 and re.search(re.escape(words), error[0]), result.output
    assert not contents(tmp_path / 'out') if (tmp_path / 'out').exists() else True


def test_folder_that_cannot_be_written(folders, tmp_path):
    (tmp_path / 'file').write_text('')
    result = run(folders / 'grey', tmp_path / 'file' / 'out')
    assert result.exit_code == 1 and result.output.strip().splitlines()[-1].startswith(f'Error: {tmp_path / "file"}')


def test_a_network_that_gives_nan_writes_no_black_images(tmp_path):
    net = tiny()
    next(net.parameters()).data.fill_(float('nan'))
    save_network(net, tmp_path / 'broken')
    result = run(tmp_path / 'broken', tmp_path / 'out', '--seeds=5')
    assert result.exit_code == 1 and 'weights are not finite: 1 of ' in result.output and not contents(tmp_path / 'out')
    next(net.parameters()).data.fill_(3e38)  # finite, and what is made of them is not
    save_network(net, tmp_path / 'net')
    result = run(tmp_path / 'net', tmp_path / 'out', '--seeds=5')
    assert result.exit_code == 1 and 'seed 5 is not finite (' in result.output and not contents(tmp_path / 'out')


def test_two_channels_are_no_picture(tmp_path):
    save_network(tiny(2), tmp_path / 'net')
    result = run(tmp_path / 'net', tmp_path / 'out', '--format=png')
    assert result.exit_code == 1 and '2 channels' in result.output
    assert run(tmp_path / 'net', tmp_path / 'out', '--seeds=0').exit_code == 0
    assert sorted(contents(tmp_path / 'out')) == ['000000.npy']


# --- writers

def test_files_appear_whole_or_not_at_all(tmp_path):
    write_npy(tmp_path / 'a.npy', np.zeros([1, 2, 2]))
    with pytest.raises(AssertionError):
        write_png(tmp_path / 'b.png', np.zeros([2, 2, 2], np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ['a.npy']


def test_writers_raise_what_a_file_raised():
    def fail():
        raise OSError(28, 'No space left on device', 'x.png')

    done = []
    with pytest.raises(OSError, match='No space left'), Writers() as writers:
        writers.submit(fail)
        writers.submit(done.append, 1)
    with Writers(threads=2, backlog=2) as writers:
        for i in range(20):
            writers.submit(done.append, i)
    assert writers.written == 20 and sorted(done)[-1] == 19
