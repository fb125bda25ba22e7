# SPDX-License-Identifier: Apache-2.0
"""Objectives. Importing the package imports every file in it, so that their terms are registered in loss.TERMS."""

import sys

from torch_utils.registry import load_all

load_all(sys.modules[__name__])
