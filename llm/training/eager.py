"""torch's optimizers without the decorators that keep torch.compile out of their methods.

The first call of a decorated method imports torch's compiler, which takes most of a second. Optimizers are
never compiled here, so the plain methods do the same.
"""

from inspect import unwrap

import torch


class Optimizer(torch.optim.Optimizer):
    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Optimizer, torch.optim.AdamW):
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
