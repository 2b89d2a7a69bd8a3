"""Python imports this by itself at start-up: the tests put this folder on a subprocess's PYTHONPATH."""

import torchvision_shim

torchvision_shim.install()
