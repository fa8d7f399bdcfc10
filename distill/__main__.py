"""``python -m distill``, for ``torchrun``."""

from distill.cli import main

main()
