"""Secure aggregation and homomorphic sums: pure functions; randomness is an argument."""
