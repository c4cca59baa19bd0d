"""`torch.autograd.Function`s around the kernels, and their registration for torch.compile. Importing a module of this
package imports Triton.

Eager calls go straight to the launchers, because a call through the dispatcher costs more than an eager operation (CPU,
torch 2.13, same machine: 14.5 us for an operation registered by `define` and `impl`, 8 us for an eager multiply). Under
torch.compile and on fake tensors the same launchers run as registered operations of the namespace ``fastvae``. These
are deterministic functions of their arguments, which include the noise's seed and offset, so that torch merges, drops
or recomputes none of them wrongly.
"""
