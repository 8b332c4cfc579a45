"""`python -m fewer` is the `fewer` command."""

from fewer.cli import main

if __name__ == "__main__":
    main()
