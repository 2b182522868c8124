# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Benchmarks: `python -m benchmarks [ring|block|session ...] [--quick] [--json FILE]`.

What counts are ratios within one run, on one machine, taken from interleaved repeats; absolute
figures are there to understand the ratios. Aims are printed, never asserted.
"""
