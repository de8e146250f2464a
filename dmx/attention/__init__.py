"""Attention mixers, one file each; importing `dmx.attention.base` is enough to find them all."""

from dmx.attention.base import ATTENTIONS, AttentionConfig, MixerContext, TokenMixer

__all__ = ["ATTENTIONS", "AttentionConfig", "MixerContext", "TokenMixer"]
