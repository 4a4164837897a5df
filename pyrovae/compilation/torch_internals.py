"""The private parts of torch that compilation needs. No other module of pyrovae uses them.

Torch may move or remove them in any release. ``MISSING`` then says what is missing, nothing is compiled, and everything
else works.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    copy_tensors = torch._foreach_copy_
    MISSING = ""
except (ImportError, AttributeError) as error:
    MISSING = str(error)


def trace(function: Callable[..., list], inputs: list[Tensor]) -> torch.fx.GraphModule:
    """Traces a function of tensors into a graph of tensor operations, at the values of the inputs."""
    # One mode for the fake tensors of the whole trace. Without it, make_fx creates one for each of them.
    with tracing(TracingContext(FakeTensorMode(allow_non_fake_inputs=True))):
        module: Any = make_fx(function)(*inputs)
    return module
