"""Pathfinder image generator: the sets of Solving-LRA-PathX and of the Long Range Arena."""

from dmx.data.pathfinder.generator import Generator, Sample, generate
from dmx.data.pathfinder.parameters import GeneratorParameters, parameters_for

__all__ = ["Generator", "GeneratorParameters", "Sample", "generate", "parameters_for"]
