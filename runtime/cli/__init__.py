"""The command line: the group of commands, one file for each command or family, shared options, the screen."""


def main() -> None:
    """Entry point: one line and an exit code for every error."""
    from edgemuse.runtime.cli.group import run_program

    run_program()
