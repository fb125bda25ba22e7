# SPDX-License-Identifier: Apache-2.0
"""How `pip install .` lays the program out: everything inside the one package ambient_trainer.

Its modules are called `training`, `dnnlib` and `torch_utils`, as those of EDM and what grew from it. At the top level of
site-packages they would be found in place of a neighbouring checkout's."""

import os
import runpy

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

INSIDE = find_packages(include=['dnnlib*', 'torch_utils*', 'metrics*', 'training*'])
SCRIPTS = runpy.run_path('ambient_trainer/__main__.py')['SCRIPTS']


class BuildWithScripts(build_py):
    """The scripts lie beside the packages that they import."""

    def run(self) -> None:
        super().run()
        for name in SCRIPTS:
            self.copy_file(f'{name}.py', os.path.join(self.build_lib, 'ambient_trainer', f'{name}.py'))


setup(packages=['ambient_trainer', *(f'ambient_trainer.{name}' for name in INSIDE)],
      package_dir={'ambient_trainer': 'ambient_trainer', **{f'ambient_trainer.{name}': name.replace('.', '/') for name in INSIDE}},
      package_data={'ambient_trainer.training': ['presets/*.json'], 'ambient_trainer.dnnlib.report': ['*.css', '*.js']},
      cmdclass={'build_py': BuildWithScripts})
