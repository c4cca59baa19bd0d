"""`torch.autograd.Function`s around the kernels, and their registration for torch.compile. Importing a module of this
package imports Triton.

Eager calls go straight to the launchers, because the dispatcher costs several times an eager operation (CPU, torch
2.13: 14.5 us registered by `define` and `impl`, 8 us an eager multiply, on the same machine). Under torch.compile and
on fake tensors the same launchers run as registered operations of the namespace ``fastvae``: deterministic functions
of their arguments, noise included, so that none is merged, dropped or recomputed wrongly.
"""
