# SPDX-License-Identifier: Apache-2.0
"""The floors of the house, held with `ast`: who may import whom, and how long a file or a function may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ('dnnlib', 'torch_utils', 'training', 'metrics')

# A module imports only from lower floors. Two packages are one floor each, and their modules may import each other.
ROOMS = {
    0: 'dnnlib dnnlib.util',
    1: 'torch_utils torch_utils.checkpoint torch_utils.command_line torch_utils.distributed torch_utils.legacy_pickle torch_utils.misc '
       'torch_utils.pickle_machine torch_utils.training_stats',
    2: 'training training.diffusers_export training.guidance training.hub_files training.images training.model_card training.registry '
       'training.run_folder '
       'metrics metrics.distances metrics.image_files metrics.report metrics.statistics',
    3: 'training.ambient training.augment training.conditioning training.corruption training.discrete training.ema training.gradients '
       'training.noise training.penalty training.timesteps training.weighting '
       'metrics.frechet metrics.inception metrics.kernel metrics.likelihood metrics.manifold metrics.memorisation metrics.scores',
    4: 'training.batch training.dataset training.networks training.pairs training.schedules metrics.bound metrics.detectors',
    5: 'training.consistency training.data_stats training.hybrid training.labels training.loss training.preconditioning '
       'training.samplers training.sources',
    6: 'training.conversion training.feed training.generation training.hub training.validation metrics.evaluate',
    7: 'training.assembly training.posthoc training.publish training.sampling metrics.periodic',
    8: 'training.configuration training.training_loop metrics.generated',
    9: 'checkpoint_tool dataset_tool eval_fid eval_nll generate plot_run train examples.demo '
       'benchmarks.consistency_bias benchmarks.consistency_toys benchmarks.data_loading benchmarks.evaluation '
       'benchmarks.improved_ddpm benchmarks.outliers '
       'benchmarks.penalty_bias benchmarks.sampling',
}
FLOORS = {name: floor for floor, names in ROOMS.items() for name in names.split()}
SHARED_FLOORS = (0, 1)
SCRIPTS = 9
NEVER = [('training.loss', 'training.networks'), ('training.networks', 'training.samplers'), ('training.samplers', 'training.discrete')]
MIRRORS = ('wandb', 'tensorboard', 'tensorboardX', 'torch.utils.tensorboard')  # for the scripts alone
MAX_LINES, MAX_FUNCTION, MAX_LOOP = 400, 60, 150
LONG_FUNCTIONS = {('training.training_loop', 'training_loop'): MAX_LOOP}

# What these modules offer without touching their hidden generator; all else in numpy.random, and all of random, is out.
KEYED = {'numpy.random': {'RandomState', 'Generator', 'Philox', 'PCG64', 'SeedSequence', 'default_rng'}, 'random': set()}
TORCH_STATE = {'manual_seed', 'seed', 'set_rng_state', 'random.manual_seed', 'random.set_rng_state', 'random.fork_rng', 'random.seed',
               'cuda.manual_seed', 'cuda.manual_seed_all', 'cuda.set_rng_state'}
TORCH_DRAWS = {'rand', 'randn', 'randint', 'randperm', 'normal', 'bernoulli', 'multinomial', 'poisson'}  # need generator=
TORCH_LIKE = {'rand_like', 'randn_like', 'randint_like'}  # take no generator
SEEDED = 'training.conditioning'  # initial weights, label dropout: drawn from torch's own state, which misc.seeded sets and puts back


def program_files():
    return sorted(path for path in ROOT.glob('*.py')) + sorted(
        path for folder in (*PACKAGES, 'examples', 'benchmarks') for path in (ROOT / folder).rglob('*.py'))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_name(path): path for path in program_files()}


def tree(name):
    return ast.parse(MODULES[name].read_text(encoding='utf-8'))


def imports(module):
    """Dotted names that a syntax tree imports, modules and their members alike, wherever the statement stands."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'imports are absolute in this house'
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def trespasses(name, module):
    """What `name` imports of the house that does not lie on a lower floor."""
    rooms = {found for found in imports(module) if found in FLOORS and found != name}
    # "from training import noise" names the empty package too: only the room counts.
    rooms -= {'torch_utils', 'training', 'metrics'}
    allowed = lambda floor: floor < FLOORS[name] or floor == FLOORS[name] and floor in SHARED_FLOORS
    return sorted(room for room in rooms if not allowed(FLOORS[room]) or (name, room) in NEVER)


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


def test_every_module_has_a_floor():
    assert sorted(MODULES) == sorted(FLOORS), 'put each module on the lowest floor that holds, in ROOMS above'


@pytest.mark.parametrize('name', sorted(MODULES))
def test_imports_go_down(name):
    assert not trespasses(name, tree(name))


def test_the_rule_sees_every_form_of_import():
    bad = ['import training.loss', 'from training import loss', 'from training.loss import Objective',
           'def f():\n    from training import loss', 'import training.loss as x', 'from training import noise',
           'from metrics.frechet import frechet_distance']
    assert all(trespasses('training.weighting', ast.parse(text)) for text in bad)
    assert not trespasses('training.weighting', ast.parse('from training import registry\nfrom torch_utils import misc\nimport torch'))
    assert trespasses('training.loss', ast.parse('from training.networks import SongUNet'))  # lower, and forbidden all the same
    assert not trespasses('torch_utils.misc', ast.parse('from torch_utils import distributed'))


def test_no_circles_within_a_shared_floor():
    graph = {name: {found for found in imports(tree(name)) if found in MODULES} - {name} for name in MODULES
             if FLOORS[name] in SHARED_FLOORS}
    while graph:
        leaves = [name for name, needs in graph.items() if not any(need in graph for need in needs if need not in PACKAGES)]
        assert leaves, f'these import each other: {sorted(graph)}'
        for name in leaves:
            del graph[name]


@pytest.mark.parametrize('name', sorted(name for name in MODULES if FLOORS[name] < SCRIPTS))
def test_mirrors_are_for_the_scripts(name):
    assert not [found for found in imports(tree(name)) if found in MIRRORS or found.split('.')[0] in MIRRORS]


@pytest.mark.parametrize('name', sorted(MODULES))
def test_no_global_random_state(name):
    draws = {f'torch.{draw}' for draw in TORCH_DRAWS | TORCH_LIKE} if name == SEEDED else set()
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
    """A longer file or function is a sign that two nouns share a room."""
    assert len(MODULES[name].read_text(encoding='utf-8').splitlines()) <= MAX_LINES
    long = {found: lines for found, lines in functions(tree(name))
            if lines > LONG_FUNCTIONS.get((name, found), MAX_FUNCTION)}
    assert not long
