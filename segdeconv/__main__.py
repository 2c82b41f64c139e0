"""Entry point of `python -m segdeconv COMMAND ...`, which equals `segdeconv COMMAND ...`."""

from segdeconv.cli.main import main

if __name__ == "__main__":
    main()
