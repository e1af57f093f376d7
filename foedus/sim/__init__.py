"""Simulation: a federation on this machine, carried out by whichever executor is fastest."""
