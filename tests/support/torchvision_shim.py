"""Make torchvision importable without its compiled operators, as for a wheel made for another build of torch.

Its module of meta registrations describes just those operators and fails if they are absent. No network in
these tests uses them, so an empty module replaces it.
"""

import sys
import types


def install() -> None:
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
