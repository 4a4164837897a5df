"""Errors that several modules raise."""


class Untraceable(Exception):
    """Why something cannot be made a graph, or should not be."""
