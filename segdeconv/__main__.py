"""`python -m segdeconv COMMAND ...` is `segdeconv COMMAND ...`."""

from segdeconv.cli import main

if __name__ == "__main__":
    main()
