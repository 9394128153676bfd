"""`python -m pgolf` is the `pgolf` command."""

import sys

from pgolf.cli.main import main

sys.exit(main())
