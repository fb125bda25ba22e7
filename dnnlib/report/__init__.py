# SPDX-License-Identifier: Apache-2.0
"""Runs as one self-contained HTML page. Reads the files of a run's folder, and knows nothing of training."""
