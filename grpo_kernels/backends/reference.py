"""Plain torch, for any device and as the kernels' specification: the losses differentiate ../reference.py by autograd.

Group advantages carry no gradient and are taken from there as they are.
"""

from ..reference import group_advantages as group_advantages
