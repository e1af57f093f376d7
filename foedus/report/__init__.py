"""Figures and tables, made from the record of runs."""
