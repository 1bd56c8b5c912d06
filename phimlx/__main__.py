"""`python -m phimlx`: the command line, as the script `phimlx` starts it."""

from phimlx.cli.main import main

if __name__ == "__main__":
    main()
