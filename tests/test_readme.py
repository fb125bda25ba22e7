# SPDX-License-Identifier: Apache-2.0
"""Every command in README.md and docs/ names scripts, options and values that exist; README's are also run, on small stand-ins."""

import importlib.util
import json
import re
import shlex
import shutil

import click
import numpy as np
import pytest
from PIL import Image

from ambient_trainer.__main__ import SCRIPTS
from tests.support import ROOT, launch, stand_ins

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
STARTS = ('python', '.venv/bin/python', 'torchrun', 'make', 'ambient', 'pip', 'conda', 'source', 'pytest', 'srun')
ELSEWHERE = {'my_train.py': 'the reader\'s own file: tests/test_extension.py runs it'}

# Not run, and why. What is left out by what a line begins with.
NOT_RUN = {'make': 'sets up an environment from the package index; the demo takes minutes, and the tests would start themselves',
           'source': 'needs the environment of make setup',
           'conda': 'needs conda and its package index',
           'pip': 'tests/test_install.py installs the package',
           '.venv/bin/python': 'the demo takes minutes'}
TINY = {'train': ['--cbase=8', '--cres=1', '--blocks=1', '--attn=0', '--dropout=0', '--batch=8', '--duration=0.0001', '--lr-rampup=0',
                  '--ema=0.001', '--tick=0.05', '--snap=1', '--dump=1', '--samples=1', '--threads=1'],
        'generate': ['--seeds=0-7', '--steps=2'],
        'eval_fid': ['--detector=pixels', '--num=8', '--kid-subsets=2', '--kid-subset-size=4'],
        'eval_fid ref': ['--detector=pixels'],
        'eval_fid sweep': ['--detector=pixels', '--seeds=0-7', '--steps=2'], 'eval_fid nearest': ['--detector=pixels'],
        'eval_nll': ['--num=2', '--rtol=0.1', '--atol=0.1', '--sigma-min=0.1'],
        'denoise': ['--steps=2'],
        'dataset_tool': ['--workers=1'], 'dataset_tool annotate': ['--kimg=0.1'],
        'refine': ['--duration=0.0001', '--rounds=1', '--detector=pixels', '--num=8', '--sample-steps=2', '--steps=2', '--threads=1'],
        'refine restore': ['--steps=2'], 'refine proximal': ['--detector=pixels', '--num=8', '--sample-steps=2']}


def blocks(text):
    """The code blocks of a page, fenced or indented by four spaces, each a list of lines, with the language of its fence or ''."""
    found, current, fence, blank = [], None, None, True
    for line in [*text.splitlines(), '']:
        mark = re.match(r'```(\w*)', line)
        if mark and fence is None:
            fence, current = mark[1], []
        elif mark:
            found.append((fence, current))
            fence = current = None
        elif fence is not None:
            current.append(line)
        elif line.startswith('    ') and (blank or current is not None):
            current = [*(current or []), line[4:]]
        elif current is not None and line.strip():
            found.append(('', current))
            current = None
        blank = not line.strip()
    return found + ([('', current)] if current else [])


def without_comment(line):
    return re.sub(r'(^|\s)#.*', '', line)


def logical_lines(lines):
    """Lines joined where a backslash or an open quote continues them."""
    joined = ''
    for line in lines:
        joined += without_comment(line).strip().removesuffix('\\')
        try:
            shlex.split(joined)
        except ValueError:
            joined += ' '
            continue
        if not line.endswith('\\'):
            yield joined
            joined = ''


def commands(path):
    """Each command of a page as its words: those of code blocks, and those that stand in a line between backticks."""
    text, variables, found = path.read_text(encoding='utf-8'), {}, []
    for language, lines in blocks(text):
        for line in logical_lines(lines) if language != 'python' else ():
            setting = re.fullmatch(r'(\w+)="([^"]*)"|(\w+)=(\S+)', line)
            if setting:
                variables[setting[1] or setting[3]] = setting[2] or setting[4]
            for name, value in variables.items():
                line = re.sub(rf'\${name}\b', value, line)
            found.append(line)
    prose = re.sub(r'^    .*$', '', re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S), flags=re.M)
    found += [' '.join(span.split()) for span in re.findall(r'(?<!`)`([^`]+)`(?!`)', prose)]
    for line in found:
        words = shlex.split(line) if line.split(' ')[0] in STARTS or '=' in line.split(' ')[0] else []
        while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
            words = words[1:]
        if len(words) > 1 and words[0] in STARTS:
            yield words


def script_and_args(words):
    """(the script that a command starts, what it is given), without the options of torchrun and srun; None for other commands."""
    if words[0] == 'ambient':
        return (f'{words[1]}.py', words[2:]) if len(words) > 2 else None
    for k, word in enumerate(words[1:], 1):
        if word.endswith('.py'):
            return word, words[k + 1:]
    return None


def click_command(script, args):
    """(command, its name, its arguments) of a script of this program, the sub-command where one is named or meant."""
    command = module(script).main
    if isinstance(command, click.Group) and args:
        name = getattr(command, 'default', None) if args[0].startswith('-') else args[0]
        if name:
            return command.commands.get(name), f'{script} {name}', args[args[0] == name:]
    return command, script, args


def module(script, loaded={}):  # noqa: B006 (one copy of each script for all tests)
    if script not in loaded:
        spec = importlib.util.spec_from_file_location(f'documented_{script.replace("/", "_")[:-3]}', ROOT / script)
        loaded[script] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[script])
    return loaded[script]


def options_missing_in(text, args):
    return [arg for arg in (arg.split('=')[0] for arg in args) if arg.startswith('--') and arg not in text
            and arg.replace('-', '_') not in text.replace('-', '_')]


def problem(words):
    """What is wrong with a documented command, in words; None where nothing is."""
    if words[0] == 'make':
        targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
        return next((f'no target {word}' for word in words[1:] if '=' not in word and word not in targets), None)
    if words[0] == 'pip':
        extras = (ROOT / 'pyproject.toml').read_text()
        return next((f'no extra {name}' for word in words if '[' in word
                     for name in word.split('[')[1].rstrip(']').split(',') if f'\n{name} = ' not in extras), None)
    if 'pytest' in words[:3]:
        return next((f'no file {word}' for word in words if word.startswith('tests/') and not (ROOT / word).exists()), None)
    if words[0].endswith('python') and words[1] == '-m':
        file = ROOT / f'{words[2].replace(".", "/")}.py'
        return f'no module {words[2]}' if not file.exists() else missing(file, words[3:])
    found = script_and_args(words)
    if found is None or found[0] in ELSEWHERE:
        return None
    script, args = found[0], [arg for arg in found[1] if arg != '...']
    if words[0] == 'ambient' and script[:-3] not in SCRIPTS or not (ROOT / script).exists():
        return f'no script {script}'
    if script.startswith('benchmarks/'):
        return missing(ROOT / script, args)
    return refusal(*click_command(script, args), partial='...' in found[1])


def missing(file, args):
    bad = options_missing_in(file.read_text(), args)
    return f'{file.name} has no {", ".join(bad)}' if bad else None


def refusal(command, name, args, partial):
    """What click says of the arguments. partial: required options that the page leaves out are added."""
    if command is None:
        return f'no command {name}'
    try:
        with command.make_context(name, list(args)):
            return None
    except click.exceptions.Exit:  # --help, or a list of choices
        return None
    except click.ClickException as err:
        message = err.format_message()
        absent = re.match("Missing option '(--[\\w-]+)'", message)
        return refusal(command, name, [*args, f'{absent[1]}=x'], partial) if partial and absent else message


PLACES = [pytest.param(words, id=f'{path.name}: {" ".join(words)}'[:120]) for path in PAGES for words in commands(path)]


@pytest.mark.parametrize('words', PLACES)
def test_documented_commands_parse(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(click.Path, 'convert', lambda self, value, param, ctx: value)  # the files are the reader's
    assert problem(words) is None


def test_a_wrong_command_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line, message in [('python train.py --outdir=runs --data=a.zip --sigmo=0.2', 'No such option'),
                          ('python train.py --outdir=runs --data=a.zip --weight=min_snrr', 'min_snrr'),
                          ('torchrun --standalone --nproc_per_node=8 generate.py --network=a --outdir=b --stepz=3', 'No such option'),
                          ('python eval_fid.py reff --data=a.zip --dest=b.npz', 'reff'), ('python trane.py --outdir=runs', 'no script'),
                          ('python benchmarks/outliers.py --jsom=a', 'has no --jsom'), ('make demos', 'no target'),
                          ('pip install .[formatz]', 'no extra'), ('python generate.py --network=a', 'Missing option')]:
        assert message in (problem(shlex.split(line)) or ''), line


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r'^```.*?^```$', '', path.read_text(encoding='utf-8'), flags=re.M | re.S)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in re.findall(r'^#+ (.*)$', text, re.M)}


@pytest.mark.parametrize('path', [*PAGES, ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md'], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r'\]\(([^)\s]+)\)', path.read_text(encoding='utf-8')):
        if re.match(r'\w+:', target):
            continue
        name, _, anchor = target.partition('#')
        page = path.parent / name if name else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


def test_every_page_is_in_the_index():
    text = (ROOT / 'docs' / 'README.md').read_text(encoding='utf-8')
    assert [page.name for page in PAGES[1:] if f']({page.name})' not in text] == ['README.md']
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert all(f'](docs/{page.name})' in readme for page in PAGES[1:])


def test_the_picture_of_the_demo(tmp_path):
    """README's picture: a panel for each set, in order, under its title; each pixel of a digit 8 pixels wide."""
    demo = module('examples/demo.py')
    levels = [50, 120, 200]
    demo.write_comparison(tmp_path / 'a.png', [(f'panel {k}', np.full([20, 1, 8, 8], k, np.uint8)) for k in levels])
    picture = np.asarray(Image.open(tmp_path / 'a.png'))
    found = [np.argwhere(picture[36:] == k) for k in levels]
    assert [len(pixels) for pixels in found] == [20 * 64 ** 2] * 3
    assert found[0][:, 1].max() < found[1][:, 1].min() and found[1][:, 1].max() < found[2][:, 1].min()
    assert (picture[:36] < 128).any(axis=0).sum() > 30  # the titles
    assert picture.shape == np.asarray(Image.open(ROOT / 'docs' / 'figures' / 'demo.png')).shape


def name_snapshots(folder, text):
    """Gives the newest snapshot of each run the name by which README calls the last one of a training in full length."""
    for run, snapshot in set(re.findall(r'runs/(\d+-\w+)/(network-snapshot-\d+)', text)):
        found = sorted((folder / 'runs' / run).glob('network-snapshot-*'))
        if found and not (folder / 'runs' / run / snapshot).exists():
            shutil.copytree(found[-1], folder / 'runs' / run / snapshot)


def tiny(script, args):
    """The arguments with those of TINY behind them, of which the last counts."""
    name = f'{script[:-3]} {args[0]}' if args and not args[0].startswith('-') else script[:-3]
    added = TINY.get(name, [] if any(arg.endswith('=help') for arg in args) else TINY.get(script[:-3], []) if name == script[:-3] else [])
    return [*args, *added]


def test_readme_runs(tmp_path):
    """The commands of README in their order, and its Python block, in one folder."""
    text, done = (ROOT / 'README.md').read_text(encoding='utf-8'), []
    stand_ins.pictures(tmp_path, photos=('photos/cats', 'photos/dogs'))
    stand_ins.published_sets(tmp_path)
    for words in commands(ROOT / 'README.md'):
        if words[0] in NOT_RUN:
            continue
        script, args = ('ambient_trainer/__main__.py', words[1:]) if words[0] == 'ambient' else script_and_args(words)
        ranks = 2 if words[0] == 'torchrun' else 1
        result = launch.run(ROOT / script, tiny(script, args), ranks=ranks, cwd=tmp_path)
        assert result.returncode == 0, f'{" ".join(words)}\n{result.stdout}\n{result.stderr}'
        name_snapshots(tmp_path, text)
        done.append(script)
    assert len(done) >= 20 and len(set(done)) >= 7
    assert json.loads((tmp_path / 'samples.fid.json').read_text())['num_images'] == 8
    assert (tmp_path / 'compare.html').exists() and (tmp_path / 'samples.png').exists()
    code = [line for language, lines in blocks(text) for line in lines if language == 'python']
    (tmp_path / 'notebook.py').write_text('\n'.join(code).replace('range(64), num_steps=18', 'range(2), num_steps=2'))
    result = launch.run(tmp_path / 'notebook.py', [], cwd=tmp_path, env={'PYTHONPATH': str(ROOT)})
    assert result.returncode == 0 and '[0, 1] torch.Size([2, 3, 16, 16])' in result.stdout, result.stdout + result.stderr
