"""Adapters for training frameworks; each module imports its own framework, and nothing here does before."""
