"""`python -m boosts` is `boosts`."""

from boosts.cli import main

main()
