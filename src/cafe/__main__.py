"""`python -m cafe`, and so `torchrun … -m cafe train …` and `accelerate launch -m cafe train …`."""

from cafe.cli import main

if __name__ == "__main__":
    main()
