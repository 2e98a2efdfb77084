"""`python -m prefloss` is `prefloss`."""

from prefloss.cli import main

if __name__ == "__main__":
    main()
