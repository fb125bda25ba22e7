# SPDX-License-Identifier: Apache-2.0
"""Helpers that know nothing of tensors."""

from dnnlib.util import EasyDict, Logger, format_time, open_url, replacing

__all__ = ['EasyDict', 'Logger', 'format_time', 'open_url', 'replacing']
