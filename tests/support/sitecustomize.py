"""Python imports this module at start-up: the tests put this folder on a subprocess's PYTHONPATH."""

import torchvision_shim

torchvision_shim.install()
