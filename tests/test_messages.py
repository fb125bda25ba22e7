# SPDX-License-Identifier: Apache-2.0
"""Errors name options that there are: those of a script that can raise them, or of the script that they name."""

import ast
import functools
import importlib
import re

import click
import pytest

from tests.support import ROOT
from tests.test_layers import MODULES, imports, tree

SCRIPTS = ('train', 'generate', 'denoise', 'eval_fid', 'eval_nll', 'dataset_tool', 'checkpoint_tool', 'plot_run', 'refine')
OTHERS = {'--distribution'}  # of other programs: srun
parsed = functools.cache(tree)
imported = functools.cache(lambda name: set(imports(parsed(name))))
OPTION = r'(--[a-z][a-z0-9-]*[a-z0-9])'
OF_A_SCRIPT = r'(\w+)\.py(?: [a-z]+)? +' + OPTION


def options(command):
    """Every option of a command and of those below it."""
    found = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return found.union(*(options(below) for below in getattr(command, 'commands', {}).values()))


def options_of(script):
    commands = [value for value in vars(importlib.import_module(script)).values() if isinstance(value, click.Command)]
    return set().union(*map(options, commands))


def reached(script):
    """The modules that a script imports, and those that they do."""
    found, todo = {script}, [script]
    while todo:
        for name in imported(todo.pop()):
            name = name if name in MODULES else name.rpartition('.')[0]
            if name in MODULES and name not in found:
                found.add(name)
                todo.append(name)
    return found


@functools.cache
def raised(name):
    """[(line, text)] of the errors that a module raises."""
    return list(_raised(name))


def _raised(name):
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield node.lineno, ' '.join(part.value for part in ast.walk(node.exc)
                                       if isinstance(part, ast.Constant) and isinstance(part.value, str))


@pytest.fixture(scope='module')
def known():
    assert all((ROOT / f'{script}.py').exists() for script in SCRIPTS)
    return {script: options_of(script) for script in SCRIPTS}


def test_options_that_errors_name(known):
    reach, wrong = {script: reached(script) for script in SCRIPTS}, []
    for name in MODULES:
        scripts = [script for script in SCRIPTS if name in reach[script]]
        for line, text in raised(name) if scripts else ():
            own = re.sub(OF_A_SCRIPT, '', text)  # the test below looks at those
            wrong += [f'{name}:{line}: {option}' for option in re.findall(OPTION, own)
                      if option not in OTHERS and not any(option in known[script] for script in scripts)]
    assert not wrong


def test_options_of_the_scripts_that_errors_name(known):
    wrong = []
    for name in MODULES:
        for line, text in raised(name):
            for script, option in re.findall(OF_A_SCRIPT, text):
                if option not in known[script]:
                    wrong.append(f'{name}:{line}: {script}.py {option}')
    assert not wrong
