"""`python -m fastdiff.cli`."""

from fastdiff.cli import main

main()
