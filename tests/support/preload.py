# SPDX-License-Identifier: Apache-2.0
"""What the server of launch.py imports once, for all that it forks: the scripts and what they import late."""

import torch._dynamo  # noqa: F401 (PyTorch imports it with the first optimizer)

import checkpoint_tool  # noqa: F401
import dataset_tool  # noqa: F401
import denoise  # noqa: F401
import eval_fid  # noqa: F401
import eval_nll  # noqa: F401
import generate  # noqa: F401
import train  # noqa: F401
import training.run.launch  # noqa: F401
