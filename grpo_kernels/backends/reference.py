"""Plain torch, for any device and as the kernels' specification: the losses differentiate ../reference.py and
../reference_advantages.py by autograd.

Advantages, returns, whitening and diversity carry no gradient and are taken from there as they are.
"""

from ..reference_advantages import gae as gae
from ..reference_advantages import group_advantages as group_advantages
from ..reference_advantages import masked_moments as masked_moments
from ..reference_advantages import whiten as whiten
from ..reference_diversity import group_diversity as group_diversity
