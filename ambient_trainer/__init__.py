# SPDX-License-Identifier: Apache-2.0
"""The installed program. Its modules are found while it runs, and by nobody else: see __main__.py."""
