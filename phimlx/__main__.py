"""`python -m phimlx`: the command line, as the script `phimlx` starts it.

Knows no command: `phimlx.cli.main` does the rest.
"""

from phimlx.cli.main import main

if __name__ == "__main__":
    main()
