"""`python -m vpipe` is the command line."""

from vpipe.cli import main

if __name__ == "__main__":
    main()
