# SPDX-License-Identifier: Apache-2.0
"""What is minimised. Every file of this folder is imported with it, so that its terms enter loss.TERMS."""

import sys

from torch_utils.registry import load_all

load_all(sys.modules[__name__])
