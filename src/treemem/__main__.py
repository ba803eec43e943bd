"""`python -m treemem` is `treemem`."""

from treemem.cli import main

main()
