"""`python -m segdeconv COMMAND ...` is `segdeconv COMMAND ...`."""

from segdeconv.cli.main import main

if __name__ == "__main__":
    main()
