"""Estimating costs: counting and measuring a step, adding up."""
