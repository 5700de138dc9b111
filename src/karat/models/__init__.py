"""Operators inside models: conversion, creation, recording, other token grids, transfer, KAN layers, distillation."""
