"""torch's optimizers without the marks that they have for torch's compiler.

At the first call of a method that is so marked, torch imports its compiler, which takes most of a second.
Nothing here compiles an optimizer; without the marks they do the same.
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
