# SPDX-License-Identifier: Apache-2.0
"""Estimating what noise images carry."""
