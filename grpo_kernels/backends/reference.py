"""Plain torch, for any device and as the kernels' specification: the losses differentiate ../reference/loss.py and
../reference/advantages.py by autograd.

Advantages, returns, whitening and diversity carry no gradient and are taken from there as they are.
"""

from ..reference.advantages import gae as gae
from ..reference.advantages import group_advantages as group_advantages
from ..reference.advantages import masked_moments as masked_moments
from ..reference.advantages import whiten as whiten
from ..reference.diversity import group_diversity as group_diversity
