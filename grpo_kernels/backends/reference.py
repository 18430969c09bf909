"""Plain torch, for any device and as the kernels' specification: the losses differentiate ../reference.py by autograd.

Group advantages and diversity carry no gradient and are taken as they are.
"""

from ..reference import group_advantages as group_advantages
from ..reference_diversity import group_diversity as group_diversity
