# SPDX-License-Identifier: Apache-2.0
"""Files that nobody should open, opened: each must load or be refused in one line."""
