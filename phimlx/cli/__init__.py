"""The command line: one file per command, each loaded only when it is called."""

EXIT_INTERRUPTED = 130
"""How a run ends that was interrupted: 128 and the number of SIGINT, as in a shell."""
