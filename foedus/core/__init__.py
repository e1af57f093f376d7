"""The pure core: what is computed, as values and functions without files, clocks, frameworks or hidden randomness."""
