"""Files of compiled networks, for execution without PyTorch (docs/compiled-files.md)."""
