"""`python -m edgemuse.runtime.cli`: the same as `edgemuse`."""

from edgemuse.runtime.cli import main

main()
