"""The former place of `grpo_kernels.tools.memory`, which user code imports from here."""

from ..tools.memory import *  # noqa: F403
from ..tools.memory import __all__ as __all__
