# SPDX-License-Identifier: Apache-2.0
"""ambient train ..., ambient generate ...: the scripts of an installed program; under torchrun: torchrun -m ambient_trainer train ...

The scripts import `training`, `dnnlib` and so on from this package's folder, which only this process looks into."""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = ('train', 'generate', 'denoise', 'eval_fid', 'eval_nll', 'dataset_tool', 'checkpoint_tool', 'plot_run', 'refine')


def main() -> None:
    """Runs the script that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    root = HERE if (HERE / 'train.py').exists() else HERE.parent  # installed, or in a checkout
    if name in (None, '-h', '--help'):
        print(f'Usage: ambient SCRIPT [OPTIONS]\n\nScripts: {", ".join(SCRIPTS)}; ambient SCRIPT --help tells their options')
        return
    if name not in SCRIPTS:
        sys.exit(f'Error: no script "{name}"; choose from {", ".join(SCRIPTS)}')
    sys.path.insert(0, str(root))
    sys.argv = [f'ambient {name}', *sys.argv[2:]]
    runpy.run_path(str(root / f'{name}.py'), run_name='__main__')


if __name__ == '__main__':
    main()
