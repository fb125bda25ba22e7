# SPDX-License-Identifier: Apache-2.0
"""Rules for the source, checked with `ast`: which package may import which, randomness, sizes of files and functions, type hints."""

import ast
import re

import pytest

from tests.support import ROOT

# A package imports from the layers below its own. Its own files may import each other, but not in a circle.
LAYERS = [['dnnlib'], ['torch_utils'], ['metrics', 'training.diffusion', 'training.estimation'], ['training.data', 'training.networks'],
          ['training.objective', 'training.checkpoints'], ['training.sampling', 'training.likelihood'], ['training.restoration'],
          ['training.evaluation'], ['training.run'], ['training.refinement'], ['scripts']]
LAYER = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
SCRIPT_FOLDERS = ('benchmarks', 'examples')
MIRRORS = ('wandb', 'tensorboard', 'tensorboardX', 'torch.utils.tensorboard')  # for the scripts alone
# Modules that define options; the scripts may use click too.
CLICK = ('torch_utils.command_line', 'training.sampling.options', 'training.run.options', 'training.run.presets',
         'training.run.published', 'training.run.launch')
MAX_LINES, MAX_FUNCTION, MAX_LOOP = 500, 60, 150
NOT_TYPED = ('training.data.convert', 'torch_utils.legacy_pickle', 'torch_utils.pickle_machine')  # without type hints so far
LONG_FUNCTIONS = {('training.run.training_loop', 'training_loop'): MAX_LOOP}

# What these modules offer without touching their hidden generator; all else in numpy.random, and all of random, is out.
KEYED = {'numpy.random': {'RandomState', 'Generator', 'Philox', 'PCG64', 'SeedSequence', 'default_rng'}, 'random': set()}
TORCH_STATE = {'manual_seed', 'seed', 'set_rng_state', 'random.manual_seed', 'random.set_rng_state', 'random.fork_rng', 'random.seed',
               'cuda.manual_seed', 'cuda.manual_seed_all', 'cuda.set_rng_state'}
TORCH_DRAWS = {'rand', 'randn', 'randint', 'randperm', 'normal', 'bernoulli', 'multinomial', 'poisson'}  # need generator=
TORCH_LIKE = {'rand_like', 'randn_like', 'randint_like'}  # take no generator
# Initial weights, and what a network that is no run's draws in training: from torch's own state, which misc.seeded sets and puts back.
SEEDED = ('training.networks.layers', 'training.networks.rows')


def program_files():
    return sorted(ROOT.glob('*.py')) + sorted(
        path for folder in ('dnnlib', 'torch_utils', 'metrics', 'training', *SCRIPT_FOLDERS) for path in (ROOT / folder).rglob('*.py'))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_name(path): path for path in program_files()}


def package_of(name):
    """The package of a module, as in LAYERS; None for the package `training` itself, which only hands on names."""
    if name == 'training':
        return None
    return next((package for package in LAYER if name == package or name.startswith(f'{package}.')), 'scripts')


def tree(name):
    return ast.parse(MODULES[name].read_text(encoding='utf-8'))


def imports(module):
    """Dotted names that a syntax tree imports, modules and their members alike, wherever the statement is."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'imports are absolute here'
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def trespasses(name, module):
    """What `name` imports from the program that is neither in its own package nor in a lower layer."""
    found = {other for other in imports(module) if other in MODULES and package_of(other) not in (None, package_of(name))}
    return sorted(other for other in found if LAYER[package_of(other)] >= LAYER[package_of(name) or 'dnnlib'])


def global_randomness(module):
    """Calls that draw from, or seed, a generator that the whole process shares."""
    names = {alias.asname or alias.name.split('.')[0]: alias.name for node in ast.walk(module) if isinstance(node, ast.Import)
             for alias in node.names}
    names |= {alias.asname or alias.name: f'{node.module}.{alias.name}' for node in ast.walk(module) if isinstance(node, ast.ImportFrom)
              for alias in node.names}
    for call in (node for node in ast.walk(module) if isinstance(node, ast.Call)):
        head, _, rest = ast.unparse(call.func).partition('.')
        full = names.get(head, '') + (f'.{rest}' if rest else '')
        package, _, function = full.rpartition('.')
        keywords = {keyword.arg for keyword in call.keywords}
        of_torch = full[6:] if full.startswith('torch.') else ''
        if (package in KEYED and function not in KEYED[package] or of_torch in TORCH_STATE | TORCH_LIKE
                or of_torch in TORCH_DRAWS and 'generator' not in keywords):
            yield full


def functions(module, prefix=''):
    """(dotted name, lines) of every function and method, without its docstring."""
    for node in ast.iter_child_nodes(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            first = body[0].lineno if body else node.lineno
            yield prefix + node.name, (node.end_lineno - first + 1) + (node.body[0].lineno - node.lineno)
        yield from functions(node, f'{prefix}{node.name}.' if hasattr(node, 'name') else prefix)


@pytest.mark.parametrize('name', sorted(MODULES))
def test_imports_go_down(name):
    assert not trespasses(name, tree(name))


def test_the_rule_sees_every_form_of_import():
    bad = ['import training.run.folder', 'from training.run import folder', 'from training.objective.loss import Objective',
           'def f():\n    from training.sampling import steppers', 'import training.checkpoints.load as x', 'import generate',
           'from training.data import pairs']
    assert all(trespasses('training.networks.ema', ast.parse(text)) for text in bad)
    good = 'from training.networks import layers\nfrom torch_utils import misc\nimport torch'
    assert not trespasses('training.networks.ema', ast.parse(good))
    assert trespasses('metrics.frechet', ast.parse('from training.diffusion import noise'))
    assert trespasses('training', ast.parse('from training.checkpoints.load import load_network'))  # it hands on names lazily


@pytest.mark.parametrize('wanted', LAYER)
def test_no_circles_within_a_package(wanted):
    graph = {name: {found for found in imports(tree(name)) if package_of(found) == wanted and found in MODULES} - {name}
             for name in MODULES if package_of(name) == wanted}
    # "from torch_utils import misc" names the package too, which is empty or hands on names: only files count.
    graph = {name: needs - {found for found in needs if any(other.startswith(f'{found}.') for other in graph)}
             for name, needs in graph.items()}
    while graph:
        leaves = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert leaves, f'these import each other: {sorted(graph)}'
        for name in leaves:
            del graph[name]


@pytest.mark.parametrize('name', sorted(name for name in MODULES if package_of(name) != 'scripts'))
def test_mirrors_and_click_are_for_scripts_and_options(name):
    found = {part for full in imports(tree(name)) for part in (full, full.split('.')[0])}
    assert not found & {*MIRRORS, *(() if name in CLICK else ('click',))}


@pytest.mark.parametrize('name', sorted(MODULES))
def test_no_global_random_state(name):
    draws = {f'torch.{draw}' for draw in TORCH_DRAWS | TORCH_LIKE} if name in SEEDED else set()
    assert not set(global_randomness(tree(name))) - draws


@pytest.mark.parametrize('text', [
    'import numpy as np\nnp.random.seed(0)', 'import numpy\nnumpy.random.rand(3)', 'from numpy import random\nrandom.randn(2)',
    'import random\nrandom.shuffle(x)', 'from random import choice\nchoice(x)', 'import torch\ntorch.manual_seed(1)',
    'import torch\ntorch.cuda.manual_seed_all(1)', 'import torch\ntorch.randn(3)', 'import torch\ntorch.randn_like(x)'])
def test_the_rule_sees_global_randomness(text):
    assert list(global_randomness(ast.parse(text)))


def test_keyed_generators_are_allowed():
    text = 'import numpy as np, torch\nnp.random.Generator(np.random.Philox(key=1)).random()\ntorch.randn(2, generator=g)\ng.manual_seed(1)'
    assert not list(global_randomness(ast.parse(text)))


def test_licence_line():
    files = program_files() + sorted((ROOT / 'tests').rglob('*.py'))
    assert not [path for path in files if not path.read_text(encoding='utf-8').startswith('# SPDX-License-Identifier: Apache-2.0\n')]


@pytest.mark.parametrize('name', sorted(MODULES))
def test_sizes(name):
    """A longer file or function is a sign that it does two things."""
    assert len(MODULES[name].read_text(encoding='utf-8').splitlines()) <= MAX_LINES
    long = {found: lines for found, lines in functions(tree(name))
            if lines > LONG_FUNCTIONS.get((name, found), MAX_FUNCTION)}
    assert not long


def without_hints(body, inside=''):
    """Dotted names of the public functions and methods whose parameters or return value lack a type; click commands have none."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            yield from without_hints(node.body, f'{inside}{node.name}.')
        if not isinstance(node, ast.FunctionDef) or node.name.startswith('_') and node.name != '__init__':
            continue
        decorators = ' '.join(map(ast.unparse, node.decorator_list))
        a = node.args
        taken = (a.posonlyargs + a.args)[bool(inside) and 'staticmethod' not in decorators:] + a.kwonlyargs + [a.vararg, a.kwarg]
        typed = all(arg.annotation for arg in taken if arg) and (node.returns or node.name == '__init__')
        if not typed and not re.search(r'\bcommand|click', decorators):
            yield inside + node.name


@pytest.mark.parametrize('name', sorted(name for name in MODULES if not name.startswith((*SCRIPT_FOLDERS, *NOT_TYPED))))
def test_public_functions_have_type_hints(name):
    assert not list(without_hints(tree(name).body))


def test_the_rule_sees_missing_type_hints():
    bad = ['def f(a) -> int: ...', 'def f(a: int): ...', 'def f(*a) -> int: ...', 'class A:\n    def f(self, *, b) -> int: ...']
    assert all(list(without_hints(ast.parse(text).body)) for text in bad)
    good = 'class A:\n    def f(self, a: int) -> None: ...\n    def _g(self, a): ...\n\n@click.command()\ndef main(a): ...'
    assert not list(without_hints(ast.parse(good).body))
