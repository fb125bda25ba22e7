# SPDX-License-Identifier: Apache-2.0
"""Runs as one self-contained HTML page, made from the files in their folders alone."""
