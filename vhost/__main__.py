# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``python -m vhost``."""

import sys

from vhost.cli import main

if __name__ == "__main__":
    sys.exit(main())
