"""``python -m dsconv``."""

from dsconv.cli import main

main()
