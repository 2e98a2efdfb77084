"""LLaMA-Factory's command line with every registered loss."""

from prefloss.integrations.llamafactory.command import main

if __name__ == "__main__":
    main()
