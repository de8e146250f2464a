"""Small real data sets from PyPI packages: stand-ins that run offline, plainly labelled."""

from dmx.data.samples.base import SAMPLES, Sample, sample_for

__all__ = ["SAMPLES", "Sample", "sample_for"]
