"""The command line: the group of commands, one file for each command or family, shared options, the screen."""
