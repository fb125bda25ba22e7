# SPDX-License-Identifier: Apache-2.0
"""Networks F and denoisers D. Every file of this folder is imported with it, so that its networks enter interface.ARCHS."""

import sys

from torch_utils.registry import load_all

load_all(sys.modules[__name__])
