"""Lets a torchvision without its compiled operators be imported, as a wheel made for another build of torch is.

Its module of meta registrations describes just those operators and fails where they are absent. No network in
these tests uses one, so an empty module takes its place.
"""

import sys
import types


def install() -> None:
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
