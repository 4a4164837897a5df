"""The pictures. Each function returns a matplotlib figure, and writes it if a path is given.

matplotlib is imported here and nowhere else.
"""

from pyrovae.plots.pictures import latent_space, learning_curve, reconstructions, samples

__all__ = ["latent_space", "learning_curve", "reconstructions", "samples"]
