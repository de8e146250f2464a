"""Estimating costs: counting and measuring a step, simulating ASHA, adding up."""
