"""Files of compiled networks, for what runs them without PyTorch (docs/compiled-files.md)."""
