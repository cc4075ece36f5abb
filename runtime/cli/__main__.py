"""`python -m edgemuse.runtime.cli`: the same as `edgemuse`."""

from edgemuse.runtime.cli.main import main

if __name__ == "__main__":
    main()
