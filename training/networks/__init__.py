# SPDX-License-Identifier: Apache-2.0
"""Networks F and denoisers D. Importing the package imports every file in it, so that their networks are registered in interface.ARCHS."""

import sys

from torch_utils.registry import load_all

load_all(sys.modules[__name__])
