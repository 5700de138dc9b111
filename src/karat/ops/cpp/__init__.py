"""Basis attention on CPUs in C++."""
