# SPDX-License-Identifier: Apache-2.0
"""Networks from folders, training states, EDM's pickles and the Hugging Face Hub; what is refused; what is written."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

from dnnlib import UserError
from tests.support import GOLDEN, edm_pickle
from torch_utils import misc
from training.checkpoints.card import model_card
from training.checkpoints.load import PRECONDS, load_network, recipe, show_recipe
from training.checkpoints.save import save_network
from training.networks import layers, preconditioning

DATA = GOLDEN
PUBLISHED = DATA / 'networks' / 'hf_ambient_laws'  # config.json + model.safetensors, as a current client of the Hub writes them
PICKLE = DATA / 'hub' / 'edm_pickle'  # network-snapshot.pkl as EDM's own code wrote it, its source text left out, and its output
OLD_CLIENT = DATA / 'hub' / 'old_client'  # config.json + pytorch_model.bin, the same weights
CONFIG = {'img_resolution': [8, 16], 'img_channels': 2, 'label_dim': 3, 'model_type': 'SongUNet', 'model_channels': 16,
          'channel_mult': [1, 2], 'num_blocks': 1, 'attn_resolutions': [4], 'augment_dim': 9}


def build(seed=0, **config):
    with misc.seeded(seed):
        return preconditioning.build_network({**CONFIG, **config}).eval()


def test_a_sampler_with_a_long_number_is_read(tmp_path):
    """The decimals of stop_sigma, which is the lowest level of the data, are no size of the network."""
    sampling = {'sampler': 'heun:stop_sigma=0.08245538484591709', 'steps': 18}
    save_network(build(sampling=sampling), tmp_path / 'network')
    assert load_network(tmp_path / 'network').sampling == sampling
    (tmp_path / 'network' / 'config.json').write_text(json.dumps({**CONFIG, 'sampling': {'sampler': 'heun', 'steps': 10 ** 12}}))
    with pytest.raises(UserError, match='asks for a far larger network'):
        load_network(tmp_path / 'network')


def output(net):
    source = misc.generator('input')
    height, width = net.img_resolution if isinstance(net.img_resolution, list) else [net.img_resolution] * 2
    x = torch.randn([2, net.img_channels, height, width], generator=source)
    labels = torch.eye(net.label_dim)[:2] if net.label_dim else None
    with torch.no_grad():
        return net(x, torch.tensor([0.5, 2.0]), labels)


def refused(ref, **options):
    """The one line that a reference is refused with."""
    with pytest.raises(UserError) as error:
        load_network(ref, **options)
    message = error.value.message
    assert '\n' not in message and os.path.basename(str(ref)) in message
    return message


# --- folders

@pytest.mark.parametrize('config', [{}, {'precond': 'vp'}, {'precond': 've'}, {'precond': 'iddpm', 'M': 50, 'label_dim': 0},
                                    {'model_type': 'DhariwalUNet', 'model_channels': 32, 'img_resolution': 8},
                                    {'units': {'offset': [1.5, 2], 'scale': 3}}])
def test_round_trip(tmp_path, config):
    net = build(**config)
    save_network(net, tmp_path / 'net')
    assert sorted(os.listdir(tmp_path)) == ['net']
    assert sorted(os.listdir(tmp_path / 'net')) == ['README.md', 'config.json', 'model.safetensors']
    found = load_network(tmp_path / 'net')
    assert torch.equal(output(found), output(net))
    assert (found.config, found.units, type(found)) == (net.config, net.units, type(net))
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_what_is_written_is_plain_json_and_float32(tmp_path):
    net = build(sigma_max=float('inf'), sigma_min=0.01).to(torch.bfloat16)
    save_network(net, tmp_path / 'net')
    refuse = lambda constant: pytest.fail(f'{constant} in config.json')
    config = json.loads((tmp_path / 'net' / 'config.json').read_text(), parse_constant=refuse)
    assert config['sigma_min'] == 0.01 and 'sigma_max' not in config
    weights = safetensors.torch.load_file(tmp_path / 'net' / 'model.safetensors')
    assert {w.dtype for w in weights.values()} == {torch.float32} and sorted(weights) == sorted(net.state_dict())


def test_saving_again_replaces_the_folder(tmp_path):
    save_network(build(1), tmp_path / 'net', card='first')
    save_network(build(2), tmp_path / 'net', card='second')
    assert torch.equal(output(load_network(tmp_path / 'net')), output(build(2)))
    assert (tmp_path / 'net' / 'README.md').read_text() == 'second' and os.listdir(tmp_path) == ['net']


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    save_network(build(1), tmp_path / 'net')
    net = build(2)
    net.config['note'] = object()  # JSON cannot hold it
    with pytest.raises(TypeError):
        save_network(net, tmp_path / 'net')
    assert os.listdir(tmp_path) == ['net']
    assert torch.equal(output(load_network(tmp_path / 'net')), output(build(1)))


def test_model_card():
    options = {'corruption': {'sigma': 0.2}, 'data': {'path': '/home/me/secret.zip'}}
    card = model_card(CONFIG, options, kimg=12.5)
    assert card.startswith('---\n') and '2 x 8 x 16' in card and '12.5 thousand' in card and '"sigma": 0.2' in card
    assert 'secret' not in card  # a card is public
    assert 'load_network' in card


def test_loading_leaves_the_global_random_state_alone(tmp_path):
    save_network(build(), tmp_path / 'net')
    before = torch.random.get_rng_state()
    load_network(tmp_path / 'net')
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize('folder', [PUBLISHED, OLD_CLIENT])
def test_published_models_are_read(folder):
    io = safetensors.torch.load_file(PUBLISHED / 'io.safetensors')
    net = load_network(folder)
    for key, augment in (('D', None), ('D_with_augment_labels', io['augment_labels'])):
        error = (net(io['x'], io['sigma'], io.get('class_labels'), augment) - io[key]).abs().amax([1, 2, 3])
        assert (error <= 2e-5 * io['sigma'].flatten().clamp(min=1)).all()


def test_published_config_with_infinity_is_read(tmp_path):
    save_network(build(), tmp_path / 'net')
    (tmp_path / 'net' / 'config.json').write_text(json.dumps({**CONFIG, 'sigma_max': float('inf')}))
    assert load_network(tmp_path / 'net').sigma_max == float('inf')


# --- training states

@pytest.fixture
def state():
    net, average = build(1), build(2)
    return {'options': {'network': net.config}, 'progress': {}, 'net': net.state_dict(), 'optimizer': {}, 'objective': {},
            'ema': {'halflife': average.state_dict(), 'power_0.050': build(3).state_dict(), 'power_0.130': build(4).state_dict()}}


def test_a_training_state_gives_its_first_average_or_its_raw_weights(tmp_path, state):
    path = tmp_path / 'pkl-like.name'  # published: what "pkl" stands in was taken for a pickle
    torch.save(state, path)
    assert torch.equal(output(load_network(path)), output(build(2)))
    for weights, seed in (('raw', 1), ('ema:0.05', 3), ('ema:.050', 3), ('ema:0.13', 4)):
        assert torch.equal(output(load_network(path, weights=weights)), output(build(seed)))
    assert refused(path, weights='ema:0.1').endswith(
        'holds no ema:0.100 weights; use --weights=ema or --weights=ema:0.050 or --weights=ema:0.130 or --weights=raw')


def test_a_state_of_float32_samples_in_bfloat16(tmp_path, state):
    torch.save(state, tmp_path / 'state.pt')
    net = load_network(tmp_path / 'state.pt')
    expected = output(net)
    net.compute_dtype = torch.bfloat16
    found = output(net)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_buffers_that_are_not_averaged_are_the_networks_own(tmp_path, state):
    state['ema'] = {'parameters only': {name: p.detach() for name, p in build(2).named_parameters()}}
    torch.save(state, tmp_path / 'state.pt')
    assert torch.equal(output(load_network(tmp_path / 'state.pt')), output(build(2)))


def test_states_that_are_none_are_refused(tmp_path, state):
    path = tmp_path / 'state.pt'
    torch.save({**state, 'ema': {}}, path)
    assert '--weights=raw' in refused(path)
    torch.save({**state, 'options': {}}, path)
    assert 'holds no network' in refused(path)
    torch.save(state['net'], path)
    assert 'not a training state' in refused(path)
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:5000])
    assert 'an incomplete one' in refused(path)
    path.write_text('hello')
    assert 'not a PyTorch file' in refused(path)
    path.write_bytes(b'')
    assert 'not a PyTorch file' in refused(path)


def test_nothing_in_a_file_is_executed(tmp_path, state):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)

    torch.save({**state, 'progress': Payload()}, tmp_path / 'state.pt')
    assert 'cannot be read' in refused(tmp_path / 'state.pt')
    (tmp_path / 'network-snapshot.pkl').write_bytes(pickle.dumps({'ema': Payload()}))
    assert 'mkdir, which is not allowed' in refused(tmp_path / 'network-snapshot.pkl')
    shutil.copytree(OLD_CLIENT, tmp_path / 'folder')
    torch.save({'weight': Payload()}, tmp_path / 'folder' / 'pytorch_model.bin')
    with pytest.raises(UserError, match='cannot be read as plain tensors'):
        load_network(tmp_path / 'folder')
    assert not (tmp_path / 'executed').exists()


# --- EDM's pickles

@pytest.mark.parametrize('config', [{}, {'precond': 'vp'}, {'precond': 've'}, {'precond': 'iddpm', 'M': 50, 'label_dim': 0},
                                    {'model_type': 'DhariwalUNet', 'model_channels': 32, 'img_resolution': 8}])
def test_a_pickle_becomes_a_folder(tmp_path, config):
    net = build(**config)
    net.config.pop('precond', None)  # which published constructors do not have
    (tmp_path / 'a file').write_bytes(edm_pickle.snapshot(net, tmp_path / 'marker'))
    found = load_network(tmp_path / 'a file')
    assert type(found) is type(net) and torch.equal(output(found), output(net))
    save_network(found, tmp_path / 'net')
    assert torch.equal(output(load_network(tmp_path / 'net')), output(net))
    assert '--weights' in refused(tmp_path / 'a file', weights='raw') and not (tmp_path / 'marker').exists()


def test_a_published_pickle_gives_the_published_output():
    net = load_network(PICKLE / 'network-snapshot.pkl')
    io = safetensors.torch.load_file(PICKLE / 'io.safetensors')
    error = (net(io['x'], io['sigma'], io['class_labels'], io['augment_labels']) - io['D']).abs().amax([1, 2, 3])
    assert (error <= 2e-5 * io['sigma'].clamp(min=1)).all()


def test_the_classes_of_pickles_are_those_of_this_program():
    assert {kind.__name__: name for name, kind in preconditioning.PRECONDS.items()} == PRECONDS


def test_pickles_of_other_networks_are_refused(tmp_path):
    path = tmp_path / 'net.pkl'
    path.write_bytes(edm_pickle.snapshot(edm_pickle.EDMPrecond(), 'marker'))
    assert 'weights do not fit the config' in refused(path)
    path.write_bytes(edm_pickle.snapshot(edm_pickle.Linear(), 'marker'))
    assert 'without constructor arguments' in refused(path) or 'class' in refused(path)


# --- refused folders and names

def test_folders_that_are_none_are_refused(tmp_path):
    folder = tmp_path / '00000-run'
    save_network(build(), folder / 'network-snapshot-000010')
    assert 'network-snapshot-000010?' in refused(folder)
    inner = folder / 'network-snapshot-000010'
    assert '--weights' in refused(inner, weights='raw')
    assert 'choose ema, raw' in pytest.raises(UserError, load_network, inner, weights='best').value.message
    (inner / 'model.safetensors').write_bytes(b'12345678')
    assert 'damaged safetensors file' in pytest.raises(UserError, load_network, inner).value.message
    (inner / 'model.safetensors').unlink()
    assert 'neither model.safetensors nor pytorch_model.bin' in refused(inner)
    (inner / 'config.json').write_text('{')
    (inner / 'model.safetensors').write_bytes(b'')
    assert 'not a JSON file' in pytest.raises(UserError, load_network, inner).value.message
    (inner / 'config.json').unlink()
    assert 'no config.json' in refused(inner)


@pytest.mark.parametrize('change, words', [
    ({'img_channels': 3}, r'model.enc.8x16_conv.weight is \[16, 2, 3, 3\] in the weights and \[16, 3, 3, 3\] in the config'),
    ({'num_blocks': 2}, r'model\..* is missing; .* is missing; .* is missing, and \d+ more'),
    ({'augment_dim': 0}, 'model.map_augment.weight is unknown$'),
    ({'model_type': 'TransformerNet'}, 'TransformerNet'),
    ({'colour': 'red'}, 'colour'),
])
def test_weights_that_do_not_fit_their_config(tmp_path, change, words):
    save_network(build(), tmp_path / 'net')
    (tmp_path / 'net' / 'config.json').write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(UserError, match=words):
        load_network(tmp_path / 'net')
    assert 'net' in refused(tmp_path / 'net')


@pytest.mark.parametrize('change', [{'model_channels': 10 ** 6}, {'num_blocks': 10 ** 5}, {'channel_mult': [1] * 10 ** 5},
                                    {'precond': 'iddpm', 'M': 10 ** 10}, {'label_dim': 10 ** 30}, {'model_channels': -16},
                                    {'img_resolution': 0}, {'channel_mult': [1, 'two']}, {'channel_mult': 2},
                                    {'model_channels': 4000, 'channel_mult': [4000, 4000]}, {'label_dim': 4096},
                                    {'precond': 'iddpm', 'diffusion': 'cosine:steps=1000000000'}, {'precond': 'iddpm', 'M': 4096},
                                    {'sampling': {'sampler': 'heun', 'steps': 10 ** 9}}])
def test_configs_of_strange_sizes_cost_nothing(tmp_path, change, monkeypatch):
    save_network(build(), tmp_path / 'net')
    (tmp_path / 'net' / 'config.json').write_text(json.dumps({**CONFIG, **change}))
    made = []
    initial = layers.initial
    monkeypatch.setattr(layers, 'initial', lambda *args, **kwargs: made.append(initial(*args, **kwargs)) or made[-1])
    assert len(refused(tmp_path / 'net')) < 600
    assert all(tensor.is_meta for tensor in made)


@pytest.mark.parametrize('key, value', [
    ('sigma_data', 'x'), ('sigma_data', None), ('sigma_data', math.nan), ('sigma_data', {}), ('sigma_min', [1]), ('use_fp16', 2),
    ('use_fp16', 'no'),
    ('img_channels', True), ('channel_mult', {'a': 1}), ('attn_resolutions', 4), ('model_type', 3), ('model_type', []), ('precond', {}),
    ('units', 5), ('units', {'scale': 1}), ('units', {'scale': 1, 'offset': 'x'}), ('img_resolution', [8]), ('img_resolution', [8, 8, 8])])
def test_values_of_other_kinds(tmp_path, key, value):
    save_network(build(), tmp_path / 'net')
    (tmp_path / 'net' / 'config.json').write_text(json.dumps({**CONFIG, key: value}))
    assert 'network configuration' in refused(tmp_path / 'net')


def test_sizes_that_files_claim(tmp_path):
    """A header, or a configuration, of many megabytes is refused before it is read."""
    save_network(build(), tmp_path / 'net')
    weights, config = tmp_path / 'net' / 'model.safetensors', tmp_path / 'net' / 'config.json'
    data = weights.read_bytes()
    weights.write_bytes((2 ** 40).to_bytes(8, 'little') + data[8:])
    assert f'its header claims {2 ** 40} bytes' in refused(tmp_path / 'net')
    weights.write_bytes(data)
    os.truncate(config, 2 ** 25)
    assert f'not a network configuration, with {2 ** 25} bytes' in refused(tmp_path / 'net')


@pytest.mark.parametrize('change, words', [
    ({'net': 5}, 'holds no network'), ({'ema': {'halflife': torch.zeros(3)}}, 'holds no network'),
    ({'options': {'network': []}}, 'holds no network'), ({'ema': {'halflife': {'x': 5}}}, '"x" holds int'),
    ({'options': {'network': {'arguments': [1]}}}, 'expected an object, got list'),
    ({'net': {'w': torch.zeros(3, dtype=torch.bfloat16)}, 'ema': {'halflife': {}}}, 'model.'),
])
def test_states_whose_parts_are_of_other_types(tmp_path, state, change, words):
    torch.save({**state, **change}, tmp_path / 'state.pt')
    assert words in refused(tmp_path / 'state.pt')


def test_recipes_in_names(capsys):
    found = {'data': 'celeba', 'sigma': 0.05, 'corruption_probability': 0.1, 'dataset_keep_percentage': 1.0}
    name = 'ambient_laws_celeba_sigma_0.05_corruption_0.1_keep_1.0'
    for ref in (name, f'owner/{name}', f'runs/{name}/net@main', Path('ambient_laws_celeba_sigma_.05_corruption_0.1_keep_1')):
        assert recipe(ref) == found
    assert recipe('ambient_laws_img_net_64_sigma_0.2_corruption_0.9_keep_1.0')['data'] == 'img_net_64'
    for ref in ('owner/name', 'runs/00000-mix', 'ambient_laws_celeba'):
        assert recipe(ref) is None
        show_recipe(ref)
    assert capsys.readouterr().out == ''
    show_recipe('owner/ambient_laws_celeba_sigma_0.05_corruption_0.1_keep_1.0')
    assert capsys.readouterr().out == ('According to its name trained on celeba: --sigma=0.05 --corruption_probability=0.1 '
                                       '--dataset_keep_percentage=1\n')


def test_names_that_are_none_are_refused():
    assert 'no such file or folder' in refused('nothing-here')
    assert 'no such file or folder' in refused('/a/b/c')


# --- the Hub, by a cache folder made by hand and by what its client raises

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub's client, which is offline; call it to add a repository."""
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)

    def add(repo, source, revision='main', commit='a' * 40):
        folder = tmp_path / 'cache' / f'models--{repo.replace("/", "--")}'
        shutil.copytree(source, folder / 'snapshots' / commit)
        (folder / 'refs').mkdir(exist_ok=True)
        (folder / 'refs' / revision).write_text(commit)

    return add


def test_a_repository_in_the_cache_is_read_offline(cache):
    cache('owner/new', PUBLISHED)
    cache('owner/old', OLD_CLIENT)
    expected = output(load_network(PUBLISHED))
    assert torch.equal(output(load_network('owner/new')), expected)
    assert torch.equal(output(load_network('owner/old')), expected)


def test_revisions(cache, tmp_path):
    save_network(build(1), tmp_path / 'one')
    cache('owner/name', PUBLISHED)
    cache('owner/name', tmp_path / 'one', revision='v1', commit='b' * 40)
    assert torch.equal(output(load_network('owner/name@v1')), output(build(1)))
    assert torch.equal(output(load_network('owner/name@' + 'a' * 40)), output(load_network('owner/name')))


def test_a_local_folder_wins_over_a_name(cache, tmp_path):
    cache('owner/name', PUBLISHED)
    save_network(build(1), tmp_path / 'owner' / 'name')
    assert torch.equal(output(load_network('owner/name')), output(build(1)))


def test_offline_and_not_in_the_cache(cache):
    assert 'not in the Hugging Face cache' in refused('owner/nothing')


@pytest.mark.parametrize('name, words', [
    ('RepositoryNotFoundError', 'no such repository'), ('RevisionNotFoundError', 'no revision "v9"'),
    ('EntryNotFoundError', 'lacks config.json'), ('LocalEntryNotFoundError', 'cannot be reached'),
    ('HFValidationError', 'Hub says: its reason'),
])
def test_what_the_hub_refuses_is_one_line(cache, monkeypatch, name, words):
    kind = getattr(huggingface_hub.utils, name)
    error = kind.__new__(kind)  # past constructors that ask for an HTTP response
    error.args = ('its reason\nand more',)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fail)
    assert words in refused('owner/name@v9')
