# SPDX-License-Identifier: Apache-2.0
"""Helpers that do not need torch."""

from dnnlib.download import open_url
from dnnlib.files import replacing
from dnnlib.util import EasyDict, Logger, UserError, append_line, format_time, one_line

__all__ = ['EasyDict', 'Logger', 'UserError', 'append_line', 'format_time', 'one_line', 'open_url', 'replacing']
