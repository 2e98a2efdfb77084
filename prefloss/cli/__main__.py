"""`python -m prefloss.cli` is `prefloss`."""

from prefloss.cli import main

if __name__ == "__main__":
    main()
