"""Language models: generation that drafts with the lower part of a decoder and verifies with the upper part."""

from __future__ import annotations

from eecompile.language.decoder import CompiledDecoder, GenerateTrace

__all__ = ["CompiledDecoder", "GenerateTrace"]
