# SPDX-License-Identifier: Apache-2.0
"""What tests share: places, small runs, small networks, exact denoisers, servers on 127.0.0.1."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / 'tests' / 'golden'
