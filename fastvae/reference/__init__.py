"""The operations in plain PyTorch: the specification, the CPU path, the test oracle and the benchmarks' eager
baseline.
"""

from fastvae.reference import discrepancy, elbo, gaussian, importance, likelihood, mixture, total_correlation

__all__ = ["discrepancy", "elbo", "gaussian", "importance", "likelihood", "mixture", "total_correlation"]
